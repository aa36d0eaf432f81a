"""The rate at its knots, by hand."""

from __future__ import annotations

import pytest
from conftest import ROOT

from lars.recipe import config
from lars.recipe.batch import BatchPlan
from lars.recipe.schedule import Schedule

IMAGENET = 1_281_167


def test_quadratic_warmup_and_the_jump_of_the_authors_solver() -> None:
    rate = Schedule(32.0, 1.0, 400, 2, "start", 4000, 2, 0.0).rate  # nvcaffe solver_32k.prototxt
    assert rate(0) == 1.0
    assert rate(200) == 1.0 + 31.0 / 4
    assert rate(400 - 1e-9) == pytest.approx(32.0)
    assert rate(400) == pytest.approx(25.92)
    assert rate(2000) == pytest.approx(8.0)
    assert rate(4000) == rate(5000) == 0.0


def test_linear_warmup_and_decay_from_its_end_are_continuous() -> None:
    rate = Schedule(10.0, 0.0, 100, 1, "warmup_end", 200, 2, 1e-4).rate
    assert rate(50) == 5.0
    assert rate(100 - 1e-9) == pytest.approx(10.0) and rate(100) == 10.0
    assert rate(200) == pytest.approx(1e-4 + (10 - 1e-4) / 4)
    assert rate(300) == rate(10**6) == 1e-4


def test_without_warmup_it_starts_at_the_full_rate() -> None:
    assert Schedule(0.1, 0.0, 0, 1, "start", 10, 1, 0.0).rate(0) == 0.1


def test_the_alexnet_recipe_jumps_from_32_to_25_92() -> None:
    recipe = config.load(ROOT / "recipes/alexnet/lars-b32k-100ep.yaml", [])
    plan = BatchPlan.of(recipe, IMAGENET, 8)
    schedule = Schedule.of(recipe, plan)
    end = 10 * IMAGENET / 32768
    assert plan.steps == 3910
    assert schedule.rate(end - 1e-9) == pytest.approx(32.0)
    assert schedule.rate(end) == pytest.approx(25.92)


@pytest.mark.parametrize("processes", [1, 2, 64])
def test_the_rate_of_a_step_knows_no_processes(processes: int) -> None:
    recipe = config.load(ROOT / "recipes/resnet50/lars-b32k-90ep.yaml", [])
    plan = BatchPlan.of(recipe, IMAGENET, processes)
    schedule = Schedule.of(recipe, plan)
    assert plan.steps == 3519
    assert [schedule.rate(s) for s in (0, 100, 1000)] == pytest.approx(
        [0.0, 5.846, 22.994], abs=0.0005
    )  # w = 547.4, T = 3518.8
