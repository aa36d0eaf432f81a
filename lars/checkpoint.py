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

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lars.config import Recipe, RecipeError, trajectory


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


def save(run: Path, state: State, weights: dict[str, Tensor], momentum: dict[str, Tensor], keep: int) -> None:
    """Write one checkpoint, from whole tensors by plain names, and remove all but the newest `keep`."""
    folder = run / "checkpoints"
    target, temporary = folder / f"step-{state.step:08d}", folder / f".step-{state.step:08d}"
    if target.is_dir():  # stopped before the next step ended
        return
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, tensors in (("model", weights), ("momentum", momentum)):
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / f"{name}.safetensors")
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


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Bring weights and statistics back into a plain model, in place."""
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))


def load_momentum(checkpoint: Path) -> dict[str, Tensor]:
    """{parameter name: whole velocity}."""
    return load_file(checkpoint / "momentum.safetensors")


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
