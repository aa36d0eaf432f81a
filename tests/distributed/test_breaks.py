"""The law broken on purpose: each of these must be seen, or the tests of the promise could not fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import DEMO, start_ranks

from lars.run.reading import read_lines, read_result

RANK = "RANK"


def seed_by_rank() -> None:
    """Dropout drawn from the rank, as a script does that calls `manual_seed(seed + rank)`."""
    from lars.engine import base

    mix64, rank = base.mix64, int(os.environ.get(RANK, 0))
    base.mix64 = lambda *keys: mix64(*keys, rank) if rank else mix64(*keys)


def weights_by_rank() -> None:
    """First weights of another rank that are one part in a million larger."""
    from recipes import train

    build_model, rank = train.build_model, int(os.environ.get(RANK, 0))

    def build(recipe):
        model, ghosts = build_model(recipe)
        for p in model.parameters():
            p.data *= 1 + 1e-6 * rank
        return model, ghosts

    train.build_model = build


def sum_in_rank_order() -> None:
    """Gradients added as floats: first this process's passes, then the processes."""
    from lars.engine import base

    class FloatSum(base.OrderFreeSum):
        def add_gradients(self) -> None:
            self.floating = getattr(self, "floating", [torch.zeros_like(p) for p in self.parameters])
            for total, p in zip(self.floating, self.parameters):
                total += p.grad
            super().add_gradients()

        def finish(self):
            sums = super().finish()
            for total, p in zip(self.floating, self.parameters):
                if dist.is_initialized():
                    dist.all_reduce(total)
                p.grad = total / self.passes
                total.zero_()
            return sums

    base.OrderFreeSum = FloatSum


def buffers_by_rank() -> None:
    """Running statistics of this process's last pass."""
    from lars.engine.plain import Engine

    update = Engine.update_statistics
    Engine.update_statistics = lambda self, means: update(self, self.statistics() / (8 // 4))


def draws_by_worker() -> None:
    """Augmentation from a random state that the loader owns, used up in the order in which samples come."""
    from lars.data import processes

    draws_of, state = processes.draws_of, np.random.default_rng(0)
    processes.draws_of = lambda seed, epochs, ids: state.random(draws_of(seed, epochs, ids).shape)


def losses(processes: int, keys: tuple[str, ...], first: Callable[[], None] | None, folder: Path) -> list[float] | str:
    """The losses of four steps, or what the run died of."""
    run = folder / str(processes)
    ranks = start_ranks(processes, DEMO / "resnet50.yaml", *keys, f"run_dir={run}", log=folder / "log", first=first)
    if any(ranks.wait()):
        return ranks.output
    return [
        line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line
    ]  # the evaluation's is the last


@pytest.mark.parametrize("law_breaker", [seed_by_rank, sum_in_rank_order, draws_by_worker])
def test_what_leaks_into_the_numbers_is_seen(
    law_breaker: Callable[[], None], tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    keys = (*tiny, "max_steps=4", "schedule.warmup_lr=8.0", "model.kwargs.drop_rate=0.5")
    one, two = (losses(w, keys, law_breaker, tmp_path) for w in (1, 2))
    assert isinstance(one, list) and isinstance(two, list), (one, two)
    assert one != two


@pytest.mark.parametrize("law_breaker", [weights_by_rank, buffers_by_rank])
def test_what_makes_processes_differ_ends_the_run(
    law_breaker: Callable[[], None], tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    said = losses(2, (*tiny, "max_steps=4"), law_breaker, tmp_path)
    assert "rank 1 on" in said and "has other weights than rank 0; they are not saved" in said
    run = tmp_path / "2"
    assert not (run / "checkpoints").exists()
    assert law_breaker is weights_by_rank or read_result(run)["status"] == "failed"  # those are seen before it begins


@pytest.mark.long
def test_dropout_alone_does_not_know_the_number_of_processes(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    """The control of the first test: the same keys, nothing broken."""
    keys = (*tiny, "max_steps=4", "schedule.warmup_lr=8.0", "model.kwargs.drop_rate=0.5")
    one, two, four = (losses(w, keys, None, tmp_path) for w in (1, 2, 4))
    assert isinstance(one, list) and one == two == four
