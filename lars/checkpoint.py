"""Checkpoints that any engine and any number of processes can load: whole float32 tensors and a few numbers.

A checkpoint is a folder `checkpoints/step-<n>` with `model.safetensors` (weights and batch-norm statistics),
`momentum.safetensors` (by parameter name; a weight with two names stands there once) and `state.json`, which has the
SHA-256 of both. It is written beside its place, synced and renamed, so that one that has its name is whole unless the
disk itself lost something; that the hashes show. `checkpoints/latest` names the newest.
"""
from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lars.config import Checkpoint, Recipe, RecipeError, trajectory
from lars.run import write_atomically

log = logging.getLogger(__name__)


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
    aliases: dict[str, str] = field(default_factory=dict)  # second name of a tied weight -> the first one
    files: dict[str, str] = field(default_factory=dict)  # file -> SHA-256


class CheckpointWriter:
    """Writes checkpoints of a run in the background, one at a time; training waits for the copy to the host only."""

    def __init__(self, run: Path, keys: Checkpoint) -> None:
        self.folder, self.keep, self.stop_on_error = run / "checkpoints", keys.keep, keys.on_error == "stop"
        self.thread: threading.Thread | None = None
        self.error: OSError | None = None

    def save(self, state: State, weights: dict[str, Tensor], momentum: dict[str, Tensor]) -> None:
        """Start to write one; whole tensors by plain names.

        Raises:
            OSError: the one before could not be written, and the recipe says stop.
        """
        self.wait()
        if (self.folder / _name(state.step)).is_dir():  # stopped before the next step ended
            return
        copies = []
        for tensors in (weights, momentum):
            kept = {name: t for name, t in tensors.items() if name not in state.aliases}
            copies.append({name: t.detach().to("cpu", copy=True).contiguous() for name, t in kept.items()})
        self.thread = threading.Thread(target=self._write, args=(state, *copies))
        self.thread.start()

    def wait(self, needed: bool = False) -> None:
        """Until the one under way is written.

        Raises:
            OSError: it could not be, and the recipe says stop or it is `needed` (the last one of a run).
        """
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.error and (needed or self.stop_on_error):
            raise self.error

    def _write(self, state: State, weights: dict[str, Tensor], momentum: dict[str, Tensor]) -> None:
        self.error = None
        target, temporary = self.folder / _name(state.step), self.folder / f".{_name(state.step)}"
        try:
            for left_behind in self.folder.glob(".step-*"):
                shutil.rmtree(left_behind)
            temporary.mkdir(parents=True)
            for name, tensors in (("model", weights), ("momentum", momentum)):
                save_file(tensors, temporary / f"{name}.safetensors")
                state.files[f"{name}.safetensors"] = _sha256(temporary / f"{name}.safetensors")
            (temporary / "state.json").write_text(json.dumps(asdict(state), indent=1))
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
            os.rename(temporary, target)
            write_atomically(self.folder / "latest", target.name + "\n")
            _sync(self.folder)
            for old in saved(self.folder.parent)[: -self.keep]:
                shutil.rmtree(old)
        except Exception as error:  # safetensors has its own class for a full disk
            shutil.rmtree(temporary, ignore_errors=True)
            self.error = OSError(f"the checkpoint of step {state.step} could not be written, the one before stays: {error}")
            if not self.stop_on_error:
                log.warning("%s; going on (checkpoint.on_error=go_on)", self.error)


def saved(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def newest(run: Path) -> tuple[Path, State] | RecipeError | None:
    """The newest checkpoint whose content is what was written; a damaged one is passed over with a warning.

    Where all are damaged the error is returned, not raised: one process looks, all have to learn of it.
    """
    found = saved(run)
    for checkpoint in reversed(found):
        try:
            state = State(**json.loads((checkpoint / "state.json").read_text()))
            damaged = [name for name, digest in state.files.items() if _sha256(checkpoint / name) != digest]
            if not damaged:
                return checkpoint, state
            reason = f"{damaged[0]} is not what was written"
        except (OSError, ValueError, TypeError) as error:
            reason = str(error)
        log.warning("%s is damaged (%s): falling back to the one before", checkpoint, reason)
    if found:
        return RecipeError(f"all checkpoints in {run} are damaged: FRESH=1 or another run_dir=... starts over")
    return None


def load_weights(checkpoint: Path, state: State, model: nn.Module) -> None:
    """Bring weights and statistics back into a plain model, in place."""
    tensors = load_file(checkpoint / "model.safetensors")
    model.load_state_dict(tensors | {name: tensors[first] for name, first in state.aliases.items()})


def load_momentum(checkpoint: Path) -> dict[str, Tensor]:
    """{parameter name: whole velocity}."""
    return load_file(checkpoint / "momentum.safetensors")


def aliases(model: nn.Module) -> dict[str, str]:
    """{name: an earlier name of the same tensor} in a plain model's state dict."""
    first: dict[Tensor, str] = {}
    named = model.state_dict(keep_vars=True).items()
    return {name: first[tensor] for name, tensor in named if first.setdefault(tensor, name) != name}


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


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
