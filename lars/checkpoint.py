"""Checkpoints that any engine and any number of processes can load: whole float32 tensors and a few numbers.

A checkpoint is a folder `checkpoints/step-<n>` with `model.safetensors` (weights and batch-norm statistics),
`momentum.safetensors` (by parameter name; a weight with two names stands there once), `state.json`, which has the
SHA-256 of both, and `state.sha256`, which has that of `state.json`. It is written beside its place, synced and renamed, so
that one that has its name is whole unless the disk itself lost something; that the hashes show. `checkpoints/latest` names
the newest.
"""
from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lars.config import Checkpoint, Recipe, RecipeError, trajectory
from lars.lock import LockLost
from lars.run import NotWritten, read_result, write_atomically

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
    made: dict[str, Any] = field(default_factory=dict)  # `reproducibility` so far, and the numeric `environment`


class CheckpointWriter:
    """Writes checkpoints of a run in the background, one at a time; training waits for the copy to the host only."""

    def __init__(self, run: Path, keys: Checkpoint, may_write: Callable[[], None] = lambda: None) -> None:
        """`may_write` raises LockLost once the run folder belongs to another process."""
        self.folder, self.keep, self.stop_on_error = run / "checkpoints", keys.keep, keys.on_error == "stop"
        self.may_write = may_write
        self.thread: threading.Thread | None = None
        self.error: NotWritten | LockLost | None = None

    def save(self, state: State, weights: dict[str, Tensor], momentum: dict[str, Tensor]) -> None:
        """Start to write one; whole tensors by plain names.

        Raises:
            NotWritten: the one before could not be written, and the recipe says stop.
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
            NotWritten: it could not be, and the recipe says stop or it is `needed` (the last one of a run).
            LockLost: from `may_write`.
        """
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.error and (needed or self.stop_on_error or isinstance(self.error, LockLost)):
            raise self.error

    def _write(self, state: State, weights: dict[str, Tensor], momentum: dict[str, Tensor]) -> None:
        self.error = None
        target = self.folder / _name(state.step)
        temporary = self.folder / f".{target.name}-{uuid.uuid4().hex}"  # of its own: who takes the folder over may be at this step too
        try:
            self.may_write()
            for left_behind in self.folder.glob(".step-*"):
                shutil.rmtree(left_behind)
            temporary.mkdir(parents=True)
            for name, tensors in (("model", weights), ("momentum", momentum)):
                save_file(tensors, temporary / f"{name}.safetensors")
                state.files[f"{name}.safetensors"] = _sha256(temporary / f"{name}.safetensors")
            (temporary / "state.json").write_text(json.dumps(asdict(state), indent=1))
            (temporary / "state.sha256").write_text(_sha256(temporary / "state.json") + "\n")
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
            self.may_write()
            os.rename(temporary, target)
            write_atomically(self.folder / "latest", target.name + "\n")
            _sync(self.folder)
            for old in saved(self.folder.parent)[: -self.keep]:
                shutil.rmtree(old)
        except LockLost as error:
            shutil.rmtree(temporary, ignore_errors=True)
            self.error = error
        except Exception as error:  # safetensors has its own class for a full disk
            shutil.rmtree(temporary, ignore_errors=True)
            before = "the one before stays" if saved(self.folder.parent) else "and there is none before it"
            self.error = NotWritten(f"the checkpoint of step {state.step} could not be written, {before}: {error}")
            if not self.stop_on_error:
                log.warning("%s; going on (checkpoint.on_error=go_on)", self.error)


def check_room(run: Path, keep: int, model: nn.Module) -> None:
    """Before a run: its disk must have room for `keep` checkpoints and the one that is being written.

    Raises:
        RecipeError: it has not.
    """
    if read_result(run).get("status") == "finished":  # nothing more may be asked of it
        return
    size = sum(t.numel() * t.element_size() for t in (*model.state_dict().values(), *model.parameters()))  # and its momentum
    there = sum(file.stat().st_size for checkpoint in saved(run) for file in checkpoint.iterdir())
    free = shutil.disk_usage(next(p for p in (run, *run.absolute().parents) if p.exists())).free
    if there + free < (keep + 1) * size:
        raise RecipeError(
            f"{run} has room for {free / 2**20:,.0f} MiB, but {keep + 1} checkpoints (checkpoint.keep={keep}, and the one that is "
            f"being written) take {(keep + 1) * size / 2**20:,.0f}: make room, lower checkpoint.keep or give another run_dir=..."
        )


def saved(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


class Claim(NamedTuple):
    """A checkpoint as its name and its `state.json` have it; whether its files are what was written is not known yet."""

    step: int
    digest: str  # of all that decides how the run goes on from it, so not of the time that it took
    path: Path


def claims(run: Path) -> list[Claim]:
    """What the run folder holds, oldest first."""
    found = []
    for checkpoint in saved(run):
        try:
            state = json.loads((checkpoint / "state.json").read_text())
            decides = [state[key] for key in ("files", "samples_hash", "bad_images", "data_fingerprint", "trajectory")]
            digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
            found.append(Claim(int(checkpoint.name.removeprefix("step-")), digest, checkpoint))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s): falling back to the one before", checkpoint, error)
    return found


def verified(checkpoint: Path) -> State | None:
    """The state of a checkpoint whose files are what was written; None, with a warning, for a damaged one."""
    try:
        written = checkpoint / "state.sha256"  # checkpoints of before it came have none
        if written.exists() and written.read_text().strip() != _sha256(checkpoint / "state.json"):
            raise ValueError("state.json is not what was written")
        state = State(**json.loads((checkpoint / "state.json").read_text()))
        damaged = [name for name, digest in state.files.items() if _sha256(checkpoint / name) != digest]
        if damaged:
            raise ValueError(f"{damaged[0]} is not what was written")
        return state
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s is damaged (%s): falling back to the one before", checkpoint, error)
        return None


def read(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """{name: tensor} of weights and statistics, and {parameter name: whole velocity}."""
    return load_file(checkpoint / "model.safetensors"), load_file(checkpoint / "momentum.safetensors")


def load_weights(tensors: dict[str, Tensor], state: State, model: nn.Module) -> None:
    """Bring weights and statistics back into a plain model, in place."""
    model.load_state_dict(tensors | {name: tensors[first] for name, first in state.aliases.items()})


def aliases(model: nn.Module) -> dict[str, str]:
    """{name: an earlier name of the same tensor} in a plain model's state dict."""
    first: dict[Tensor, str] = {}
    named = model.state_dict(keep_vars=True).items()
    return {name: first[tensor] for name, tensor in named if first.setdefault(tensor, name) != name}


def check_same_run(then: dict[str, Any], recipe: Recipe, data_fingerprint: str) -> None:
    """A resume must not change what the run is.

    Args:
        then: the trajectory of the run in the folder, and its "data fingerprint".

    Raises:
        RecipeError: names every difference and the way to start another run.
    """
    now = json.loads(json.dumps(trajectory(recipe) | {"data fingerprint": data_fingerprint}))
    changed = [key for key in sorted({*now, *then}) if then.get(key) != now.get(key)]
    if changed:
        told = "; ".join(f"{key}: {str(then.get(key))[:40]} -> {str(now.get(key))[:40]}" for key in changed)
        raise RecipeError(f"{recipe.run_dir} holds another run ({told}): give this one its own run_dir=...")


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
