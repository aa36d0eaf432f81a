"""Slots, passes, processes: what divides, what is refused, and with which remedy."""

from __future__ import annotations

import pytest
from conftest import DEMO, ROOT

from lars.recipe import config
from lars.recipe.batch import BatchPlan
from lars.recipe.refusal import RecipeError


def plan(samples: int = 10_007, processes: int = 1, *overrides: str, even: bool = True) -> BatchPlan:
    return BatchPlan.of(config.load(DEMO / "resnet50.yaml", list(overrides)), samples, processes, even)


def test_passes_cover_the_step_for_every_process_count() -> None:
    for processes in (1, 2, 3, 4, 6, 8, 12, 24):
        p = plan(10_007, processes)
        assert [i for rank in range(processes) for i in p.local_passes(rank)] == list(range(24))


@pytest.mark.parametrize("processes", range(1, 25))
def test_where_the_order_free_sum_adds_any_number_of_processes_shares_the_passes(processes: int) -> None:
    p = plan(10_007, processes, even=False)
    shares = [p.local_passes(rank) for rank in range(processes)]
    assert [i for share in shares for i in share] == list(range(24))
    assert max(map(len, shares)) == p.passes_per_process and {len(share) for share in shares} <= {
        24 // processes,
        p.passes_per_process,
    }


def test_more_processes_than_passes_are_refused_even_there() -> None:
    with pytest.raises(RecipeError) as error:
        plan(10_007, 25, even=False)
    assert str(error.value) == (
        "25 processes are more than the 24 passes of a step (global_batch=768 / micro_batch=32): use 24 processes"
    )
    smaller = ("bn_group=8", "runtime.micro_batch=32")
    with pytest.raises(RecipeError, match="use 24 processes, or runtime.micro_batch=24"):
        plan(10_007, 25, *smaller, even=False)


def test_evaluations_end_every_epoch_and_the_run() -> None:
    p = plan(1000, 1, "global_batch=320", "epochs=3.5", "schedule.warmup_epochs=1")
    assert p.steps == 11  # 10.94
    assert p.evaluation_steps([1, 2, 3]) == [4, 7, 10, 11]


@pytest.mark.parametrize(
    ("processes", "overrides", "words"),
    [
        (5, (), ["5 processes", "24 passes", "use 4 or 6"]),
        (
            4,
            ("global_batch=960", "bn_group=8", "runtime.micro_batch=32"),
            ["30 passes", "use 3 or 5 processes, or runtime.micro_batch=24"],
        ),
        (1, ("bn_group=36",), ["bn_group=36", "use 32 or 48"]),
        (1, ("runtime.micro_batch=48",), ["no multiple of bn_group=32", "use 32 or 64"]),
        (1, ("runtime.micro_batch=160",), ["runtime.micro_batch=160 does not divide", "use 128 or 192"]),
        (1, ("global_batch=12288",), ["10007 samples, fewer than global_batch=12288"]),
    ],
)
def test_what_does_not_divide_is_refused_with_what_does(
    processes: int, overrides: tuple[str, ...], words: list[str]
) -> None:
    with pytest.raises(RecipeError) as error:
        plan(10_007, processes, *overrides)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_start_up_line_names_every_number() -> None:
    recipe = config.load(ROOT / "recipes/resnet50/lars-b32k-90ep.yaml", ["runtime.micro_batch=256"])
    assert BatchPlan.of(recipe, 1_281_167, 8).start_up_line() == (
        "global_batch 32768 = 8 processes x 16 passes x micro_batch 256 (4 of bn_group 64) | "
        "1,281,167 samples x 90 epochs = 3,519 steps"
    )
    assert (
        BatchPlan.of(recipe, 1_281_167, 24, even=False)
        .start_up_line()
        .startswith(
            "global_batch 32768 = 128 passes (on 24 processes, 5 or 6 each) x micro_batch 256 (4 of bn_group 64) | "
        )
    )
