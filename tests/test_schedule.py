"""The rate at its knots, by hand."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT

from lars.recipe import config
from lars.recipe.batch import BatchPlan
from lars.recipe.refusal import RecipeError
from lars.recipe.schedule import Schedule, evaluation_epochs, training_size

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


def test_cosine_is_torch_s() -> None:
    rate = Schedule(0.8, 0.0, 0, 1, "start", 40, 1, 0.01, "cosine").rate
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([parameter], 0.8), 40, eta_min=0.01)
    for step in range(41):
        # theirs is a chain of 40 products and ours one expression: 40 roundings of 2^-53 and a few of the cosine
        assert rate(step) == pytest.approx(theirs.get_last_lr()[0], rel=0, abs=0.8 * 100 * 2.0**-53)
        theirs.optimizer.step()
        theirs.step()
    assert rate(41) == 0.01


def test_steps_are_torch_s_and_exact() -> None:
    rate = Schedule(0.8, 0.0, 5, 1, "start", 1, 1, 0.0, "step", milestones=(10.0, 20.5), gamma=0.5).rate
    assert [rate(step) for step in (5, 9, 10, 20, 21)] == [0.8, 0.8, 0.4, 0.4, 0.2]


def test_warm_up_then_stable_then_decay() -> None:
    recipe = config.load(
        ROOT / "recipes/demo/alexnet.yaml", ["schedule.hold_epochs=3", "schedule.decay_from=warmup_end"]
    )
    plan = BatchPlan.of(recipe, 1000 * recipe.global_batch, 1)
    rate, epoch, warmup = Schedule.of(recipe, plan).rate, 1000, recipe.schedule.warmup_epochs
    held, last = (warmup + 3) * epoch, plan.steps
    assert {rate(step) for step in (warmup * epoch, held - 1, held)} == {recipe.optimizer.lr}
    assert rate(held + 1) < recipe.optimizer.lr
    left = (last - 1 - held) / (last - held)
    assert rate(last - 1) == pytest.approx(recipe.optimizer.lr * (1 - left) ** recipe.schedule.power, rel=1e-9)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("schedule.shape=cosine schedule.power=2", "power: 1"),
        ("schedule.shape=step schedule.power=1", "milestones"),
        ("schedule.milestones=[3]", "milestones"),
        ("schedule.shape=step schedule.power=1 schedule.milestones=[5,3]", "grow"),
        ("schedule.shape=step schedule.power=1 schedule.milestones=[3] schedule.end_lr=0.1", "end_lr"),
        ("schedule.hold_epochs=1e6", "leaves nothing"),
        ("schedule.shape=cosin", "cosine"),
        ("augment.sizes=[28] augment.size_epochs=[3]", "one positive size more"),
        ("augment.sizes=[0,28] augment.size_epochs=[3]", "one positive size more"),
        ("augment.sizes=[20,24,28] augment.size_epochs=[5,3]", "grow"),
        ("augment.sizes=[20,28] augment.size_epochs=[30]", "below epochs=16"),
        ("augment.sizes=[28] augment.crop=random_crop", "random_resized_crop"),
        ("augment.sizes=[28] runtime.portable=false runtime.compile=true", "compile false"),
    ],
)
def test_a_key_without_use_is_refused(wrong: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        config.load(ROOT / "recipes/demo/alexnet.yaml", wrong.split())


@pytest.mark.parametrize(
    "keys, epochs",
    [
        ("", [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("mllog=true", [4, 8]),
        ("mllog=true evaluation.first_epoch=2", [2, 6]),
        ("mllog=true evaluation.every_epochs=3", [3, 6, 9]),
        ("evaluation.every_epochs=5 evaluation.first_epoch=7", [7]),
        ("evaluation.every_epochs=50", []),
    ],
)
def test_a_run_is_evaluated_after_these_epochs(keys: str, epochs: list[int]) -> None:
    recipe = config.load(ROOT / "recipes/demo/alexnet.yaml", ["epochs=9.5", *keys.split()])
    assert list(evaluation_epochs(recipe)) == epochs


def test_images_grow_in_the_epoch_that_the_recipe_says() -> None:
    """FFCV's 16 epochs: 160 pixels, from the twelfth epoch on 192; evaluated at 256."""
    recipe = config.load(ROOT / "recipes/resnet50/ffcv-16ep.yaml", [])
    assert [training_size(recipe, epoch) for epoch in (0, 11.99, 12.0, 15.9)] == [160, 160, 192, 192]
    assert recipe.model.image_size == 256


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
