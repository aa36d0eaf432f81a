"""Checkpoints that any number of processes can load: weights, momentum and a few numbers.

A checkpoint is a folder `checkpoints/step-<n>` with `model.safetensors`, `momentum.safetensors` (by parameter name) and
`state.json`. It is written beside its place and renamed, so that one that has its name is whole.
"""
from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lars.config import Recipe, RecipeError, trajectory
from lars.run import unwrapped_name


@dataclass
class State:
    """What a run is beside its tensors."""

    step: int
    samples_hash: int
    bad_images: int
    seconds: float
    evaluation: dict[str, float]  # step, top1, top5 of the last one; empty before the first
    data_fingerprint: str
    trajectory: dict[str, Any]


def save(run: Path, state: State, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """Write one checkpoint and remove all but the newest `keep`."""
    folder = run / "checkpoints"
    target, temporary = folder / f"step-{state.step:08d}", folder / f".step-{state.step:08d}"
    if target.is_dir():  # stopped before the next step ended
        return
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {unwrapped_name(k): v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    momentum = {
        unwrapped_name(name): optimizer.state[p]["momentum_buffer"].detach().cpu().contiguous()
        for name, p in model.named_parameters()
        if p in optimizer.state
    }
    save_file(weights, temporary / "model.safetensors")
    save_file(momentum, temporary / "momentum.safetensors")
    (temporary / "state.json").write_text(json.dumps(asdict(state), indent=1))
    for file in temporary.iterdir():
        _sync(file)
    os.rename(temporary, target)
    _sync(folder)
    for old in saved(run)[:-keep]:
        shutil.rmtree(old)


def saved(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def read_state(checkpoint: Path) -> State:
    return State(**json.loads((checkpoint / "state.json").read_text()))


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Bring weights and momentum back, in place."""
    weights = load_file(checkpoint / "model.safetensors")
    model.load_state_dict({name: weights[unwrapped_name(name)] for name in model.state_dict()})
    momentum = load_file(checkpoint / "momentum.safetensors")
    for name, p in model.named_parameters():
        if unwrapped_name(name) in momentum:
            optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(momentum[unwrapped_name(name)])


def check_same_run(state: State, recipe: Recipe, data_fingerprint: str) -> None:
    """A resume must not change what the run is.

    Raises:
        RecipeError: names every difference and the way to start another run.
    """
    now = json.loads(json.dumps(trajectory(recipe)))
    changed = [f"{k}: {state.trajectory.get(k)} -> {now.get(k)}" for k in sorted({*now, *state.trajectory}) if state.trajectory.get(k) != now.get(k)]
    if state.data_fingerprint != data_fingerprint:
        changed.append(f"data fingerprint: {state.data_fingerprint[:12]} -> {data_fingerprint[:12]}")
    if changed:
        raise RecipeError(f"{recipe.run_dir} holds another run ({'; '.join(changed)}): give this one its own run_dir=...")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
