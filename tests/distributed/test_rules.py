"""Optimizers, clipping, shapes of the rate and moving averages under the law, on every engine."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, play, start_ranks
from distributed.parity import RECIPE, engine_keys, take_timm, weights_after
from safetensors.torch import load_file

from lars.recipe.launched import environment_of
from lars.run.reading import read_lines
from recipes.train import main

ADAM = (
    "optimizer.lr=0.02",
    "optimizer.weight_decay=0.01",
    "optimizer.beta1=0.9",
    "optimizer.beta2=0.99",
    "optimizer.adam_eps=1e-6",
    "schedule.warmup_lr=0.01",
)
RULES = {
    "lamb": ("optimizer.name=lamb", *ADAM),
    "adamw": ("optimizer.name=adamw", *ADAM, "optimizer.lr=0.002"),
    "clipped sgd": ("optimizer.name=sgd", "optimizer.lr=0.5", "schedule.warmup_lr=0.2", "clip_norm=0.5"),
}
AROUND = {
    "cosine": ("schedule.shape=cosine", "schedule.power=1", "schedule.warmup_epochs=0"),
    "steps": ("schedule.shape=step", "schedule.power=1", "schedule.warmup_epochs=0", "schedule.milestones=[0.2,0.4]"),
    "held": ("schedule.warmup_epochs=0", "schedule.hold_epochs=0.3", "schedule.decay_from=warmup_end", "epochs=1"),
    "sizes": (  # from the steps 2 and 3 on
        "augment.crop=random_resized_crop",
        "augment.scale=[0.3,1.0]",
        "augment.sizes=[20,24,28]",
        "augment.size_epochs=[0.15,0.25]",
    ),
    "average": ("ema_decay=0.9", "clip_norm=1.0"),
}


def kept(run: Path, step: int) -> list[bytes]:
    return [(run / f"checkpoints/step-{step:08d}/{name}.safetensors").read_bytes() for name in ("model", "momentum")]


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param((*RULES["lamb"], *AROUND["average"], *AROUND["cosine"], *AROUND["sizes"]), id="all at once"),
        *(pytest.param(keys, id=name, marks=pytest.mark.long) for name, keys in {**RULES, **AROUND}.items()),
    ],
)
def test_one_hash_at_1_2_and_4_processes_and_through_a_kill(
    keys: tuple[str, ...], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    more = (*tiny, *keys, "checkpoint.every_steps=1", "checkpoint.keep=9")
    play(1, RECIPE, *more, "max_steps=5", f"run_dir={tmp_path / 'one'}", log=tmp_path / "log")
    play(2, RECIPE, *more, "max_steps=2", f"run_dir={tmp_path / 'two'}", log=tmp_path / "log")
    ranks = start_ranks(2, RECIPE, *more, "max_steps=5", f"run_dir={tmp_path / 'two'}", log=tmp_path / "log")
    while not [line for line in read_lines(tmp_path / "two/metrics.jsonl", "train") if line["step"] == 4]:
        time.sleep(0.01)
    for process in ranks.processes:
        os.kill(process.pid, signal.SIGKILL)
    ranks.wait()
    play(4, RECIPE, *more, "max_steps=5", f"run_dir={tmp_path / 'two'}", log=tmp_path / "log")
    assert kept(tmp_path / "one", 5) == kept(tmp_path / "two", 5)
    scores = [read_lines(tmp_path / name / "metrics.jsonl", "eval")[-1] for name in ("one", "two")]
    assert scores[0] == scores[1] and ("ema_top1" in scores[0]) == any("ema" in key for key in keys)


def from_state(
    control: Path, run: Path, processes: int, engine: str, *keys: str, first: object = None
) -> dict[str, torch.Tensor]:
    """The weights of the third step, on an engine, from the control's state after two."""
    shutil.copytree(control / "checkpoints/step-00000002", run / "checkpoints/step-00000002")
    own, where = engine_keys(engine)
    more = (*keys, *own, "max_steps=3", f"run_dir={run}")
    play(processes, RECIPE, *more, log=run.with_suffix(".log"), where=where, first=first)
    return weights_after(run, 3)


def distance(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((some[name] - others[name]).square().sum()) for name in others))


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_the_same_on_every_engine(rule: str, tiny: tuple[str, ...], tmp_path: Path) -> None:
    """Compared with a control that differs by rounding alone: the same step in passes of half the size.

    Sums of n float32 terms in another order differ by at most a factor of n, and usually by sqrt(n); an engine adds two
    passes' sums of one process to those of the other, a few additions more than the control. Tenfold is more than its
    rounding explains, and a rule that took norms of slices would be off by the whole of the step.
    """
    keys, control = (*tiny, *RULES[rule]), tmp_path / "control"
    more = ("max_steps=3", "checkpoint.every_steps=1", "checkpoint.keep=9", f"run_dir={control}")
    play(1, RECIPE, *keys, *more, log=tmp_path / "log")
    before, after = (weights_after(control, step) for step in (2, 3))
    rounding = distance(from_state(control, tmp_path / "half", 1, "plain", *keys, "runtime.micro_batch=4"), after)
    step = distance(before, after)
    assert 0 < rounding < 1e-3 * step
    for engine in ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"):
        away = distance(from_state(control, tmp_path / engine, 2, engine, *keys), after)
        print(rule, engine, f"{away / rounding:.2f} of the rounding control's, {away / step:.1e} of the step")
        assert away <= 10 * rounding, engine
        saved, wanted = (
            load_file(r / "checkpoints/step-00000003/momentum.safetensors") for r in (tmp_path / engine, control)
        )
        assert {name: t.shape for name, t in saved.items()} == {name: t.shape for name, t in wanted.items()}


@pytest.mark.long
def test_timms_lamb_is_another_rule_under_zero(tiny: tuple[str, ...], tmp_path: Path) -> None:
    """The disease that exact norms cure, in the same comparison: the rule is off by more than any rounding."""
    keys, control = (*tiny, *RULES["lamb"]), tmp_path / "control"
    more = ("max_steps=2", "checkpoint.every_steps=1", f"run_dir={control}")
    play(1, RECIPE, *keys, *more, log=tmp_path / "log")
    before = weights_after(control, 2)
    alone = from_state(control, tmp_path / "alone", 1, "plain", *keys, first=take_timm)
    half = from_state(control, tmp_path / "half", 1, "plain", *keys, "runtime.micro_batch=4", first=take_timm)
    sharded = from_state(control, tmp_path / "zero1", 2, "zero1", *keys, first=take_timm)
    assert distance(sharded, alone) > 100 * distance(half, alone)
    assert distance(sharded, alone) > 0.01 * distance(before, alone)


def test_an_average_of_slices_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name, value in environment_of(ROOT / "launch/zero3.yaml").items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    keys = ("--processes", "2", *AROUND["average"], f"run_dir={tmp_path / 'run'}")
    assert main(["--config", str(RECIPE), "--check", *keys]) == 2
    assert capsys.readouterr().err.startswith("error: ema_decay averages whole weights, and zero3 keeps slices")
    assert not (tmp_path / "run").exists()
