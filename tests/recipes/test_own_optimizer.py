"""An optimizer in a copied recipe folder, registered by its `model.py`: Lion (Chen et al. 2023, arXiv 2302.06675)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO, ROOT, play
from safetensors import safe_open

from lars.run.reading import read_lines, read_result

LION = """
from dataclasses import dataclass

import torch

from lars.optim.base import Optimizer
from lars.optim.key import SHARE, key
from lars.optim.registry import Keys, register


@dataclass
class LionKeys(Keys):
    beta1: float = key("weight of the velocity in an update", 0.9, limit=SHARE)
    beta2: float = key("share of the velocity that is kept", 0.99, limit=SHARE)


class Lion(Optimizer):
    state_tensors = ("exp_avg",)
    slices = "elementwise"

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                velocity = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = velocity.mul(group["beta1"]).add(p.grad, alpha=1 - group["beta1"]).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                velocity.mul_(group["beta2"]).add_(p.grad, alpha=1 - group["beta2"])


@register("lion", LionKeys)
def build(keys, trained):
    return Lion(trained, {"lr": keys.lr, "weight_decay": keys.weight_decay, "beta1": keys.beta1, "beta2": keys.beta2})
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A copy of the demo's ResNet-50 as a user makes it, with train.py where it is looked for."""
    folder = tmp_path / "recipes" / "mine"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "recipes/train.py", folder.parent)
    (folder / "model.py").write_text(LION)
    text = (DEMO / "resnet50.yaml").read_text()
    start, end = text.index("optimizer:"), text.index("schedule:")
    own = "optimizer:\n  name: lion\n  lr: 0.001\n  weight_decay: 0.01\n"
    (folder / "lion.yaml").write_text(text[:start] + own + text[end:])
    return folder / "lion.yaml"


@pytest.mark.long
@pytest.mark.parametrize("engines", [("zero2",), ("zero0", "fsdp2")], ids=" and ".join)
def test_it_trains_resumes_and_is_sharded(
    engines: tuple[str, ...], recipe: Path, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    def trained(processes: int, name: str, steps: int, **how: str) -> dict:
        keys = (f"run_dir={tmp_path / name}", "schedule.warmup_lr=0.001", f"max_steps={steps}")
        play(processes, recipe, *tiny, *keys, log=tmp_path / f"{name}.log", **how)
        return read_result(tmp_path / name)

    whole = trained(1, "whole", 6)
    assert trained(2, "two", 3)["weights_sha256"] != whole["weights_sha256"]
    assert trained(2, "two", 6)["weights_sha256"] == whole["weights_sha256"]  # resumed, on another number of processes
    with safe_open(tmp_path / "two/checkpoints/step-00000006/momentum.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    for engine in engines:
        sharded = trained(2, engine, 3, where=engine)
        assert (sharded["engine"], sharded["reproducibility"]) == (engine, "numeric")
        losses = [
            [x["loss"] for x in read_lines(tmp_path / name / "metrics.jsonl", "train")] for name in (engine, "two")
        ]
        assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)  # before the first update only rounding differs
        with safe_open(tmp_path / engine / "checkpoints/step-00000003/momentum.safetensors", "pt") as file:
            assert {name: file.get_slice(name).get_shape() for name in file.keys()} == shapes


def test_its_keys_are_listed(recipe: Path) -> None:
    command = [sys.executable, "-m", "lars", "keys", str(recipe)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "optimizer.beta1" in shown.stdout and "optimizer.trust" not in shown.stdout
