"""Checkpoints that any engine and any number of processes can load: whole float32 tensors and a few numbers.

A checkpoint is a folder `checkpoints/step-<n>` with `model.safetensors` (weights and batch-norm statistics),
`momentum.safetensors` (by parameter name; a weight with two names stands there once), `state.json`, which has the
SHA-256 of both, and `state.sha256`, which has that of `state.json`. It is written beside its place, synced and renamed, so
that one that has its name is whole unless the disk itself lost something; that the hashes show. `latest` names the newest.
"""
from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lars.config import Checkpoint, Recipe, RecipeError, one_line, trajectory
from lars.lock import LockLost
from lars.reading import open_regular, read_bytes
from lars.run import NotWritten, write_atomically

log = logging.getLogger(__name__)

_FILES = ("model.safetensors", "momentum.safetensors")


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
    content: list[str] = field(default_factory=list)  # of both splits: hashes of the row groups that were read so far
    format: int = 1  # since 2 there is always a state.sha256, and a velocity for every trained tensor


class CheckpointWriter:
    """Writes checkpoints of a run in the background, one at a time; training waits for the copy to the host only."""

    def __init__(self, run: Path, keys: Checkpoint, may_write: Callable[[], None] = lambda: None) -> None:
        """`may_write` raises LockLost once the run folder belongs to another process."""
        self.folder, self.keep, self.stop_on_error = run / "checkpoints", keys.keep, keys.on_error == "stop"
        self.may_write = may_write
        self.whole: set[Path] = set()  # those that this process has read back or verified
        self.thread: threading.Thread | None = None
        self.error: NotWritten | LockLost | None = None

    def save(self, state: State, weights: dict[str, Tensor], momentum: dict[str, Tensor]) -> None:
        """Start to write one; whole tensors by plain names.

        Raises:
            NotWritten: the one before could not be written, and the recipe says stop.
        """
        self.wait()
        if self._is_whole(self.folder / _name(state.step)):  # stopped before the next step ended
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
            state.format = 2
            for name, tensors in zip(_FILES, (weights, momentum)):
                save_file(tensors, temporary / name)
                state.files[name] = _sha256(temporary / name)
            (temporary / "state.json").write_text(json.dumps(asdict(state), indent=1))
            (temporary / "state.sha256").write_text(_sha256(temporary / "state.json") + "\n")
            for file in temporary.iterdir():
                shutil.copymode(temporary / "state.json", file)  # safetensors' own mode is 0600, whatever the umask
                _sync(file)
            _sync(temporary)
            self.may_write()
            if os.path.lexists(target):
                self._put_aside(target)
            os.rename(temporary, target)
            self._read_back(target, weights, momentum)
            write_atomically(self.folder / "latest", target.name + "\n")
            _sync(self.folder)
            for other in saved(self.folder.parent):
                if not self._is_whole(other):
                    self._put_aside(other)
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

    def _is_whole(self, checkpoint: Path) -> bool:
        """Read at most once by a process; False where there is none, too."""
        if checkpoint.is_dir() and checkpoint not in self.whole and not _damage(checkpoint):
            self.whole.add(checkpoint)
        return checkpoint.is_dir() and checkpoint in self.whole

    def _put_aside(self, damaged: Path) -> None:
        """Out of the way of rotation and resume, for whoever wants to know what happened to it."""
        place = damaged.with_name(f"damaged-{damaged.name}")
        shutil.rmtree(place, ignore_errors=True)
        os.rename(damaged, place)
        log.warning("%s is damaged: it is kept as %s", damaged, place.name)

    def _read_back(self, target: Path, *written: dict[str, Tensor]) -> None:
        """What a resume would find must be what memory holds.

        Raises:
            OSError: it is not; the checkpoint is put aside.
        """
        why = _damage(target)
        for name, tensors in zip(_FILES, written) if not why else ():
            found = load_file(target / name)
            same = (torch.equal(_bits(found[key]), _bits(tensor)) for key, tensor in tensors.items())
            if found.keys() != tensors.keys() or not all(same):
                why = f"{name} holds other tensors"
        if why:
            self._put_aside(target)
            raise OSError(f"it does not read back as it was written ({why})")
        self.whole.add(target)


def saved(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8,18}", path.name))


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
            state = asdict(_state(checkpoint))
            decides = [state[key] for key in ("files", "samples_hash", "bad_images", "data_fingerprint", "trajectory")]
            digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
            found.append(Claim(state["step"], digest, checkpoint))
        except (OSError, ValueError) as error:
            log.warning("%s is damaged (%s): falling back to the one before", checkpoint, error)
    return found


def verified(checkpoint: Path) -> State | None:
    """The state of a checkpoint whose files are what was written; None, with a warning, for a damaged one."""
    if why := _damage(checkpoint):
        log.warning("%s is damaged (%s): falling back to the one before", checkpoint, why)
        return None
    return _state(checkpoint)


def _damage(checkpoint: Path) -> str:
    """In what a checkpoint is not what was written; empty if it is."""
    try:
        state, written = _state(checkpoint), read_bytes(checkpoint / "state.sha256", 1 << 10)
        if written is None and state.format > 1:
            return "state.sha256 is gone"
        if written is not None and written.decode().strip() != _sha256(checkpoint / "state.json"):
            return "state.json is not what was written"
        other = [name for name, digest in state.files.items() if _sha256(checkpoint / name) != digest]
        return f"{other[0]} is not what was written" if other else ""
    except (OSError, ValueError) as error:
        return str(error)


def _state(checkpoint: Path) -> State:
    """What `state.json` says.

    Raises:
        ValueError: it is not what a run writes.
    """
    try:
        state = State(**json.loads(read_bytes(checkpoint / "state.json") or b""))
        wrong = [name for name, kind in get_type_hints(State).items() if not _is(getattr(state, name), kind)]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"state.json: {one_line(error)}") from None
    if wrong:
        raise ValueError(f"state.json: {wrong[0]} is of another type")
    if state.step != int(checkpoint.name.removeprefix("step-")):
        raise ValueError(f"state.json is of step {state.step}")
    if set(state.files) != set(_FILES):
        raise ValueError(f"state.json does not list {' and '.join(_FILES)}")
    batch, whole = state.trajectory.get("global_batch"), set(state.evaluation) in (set(), {"step", "top1", "top5"})
    counted = not isinstance(batch, int) or 0 <= state.bad_images <= state.step * batch
    if not whole or not counted or not isinstance(state.made.get("environment", {}), dict):
        raise ValueError("state.json: bad_images, evaluation or made is not what a run writes")
    return state


def _is(value: Any, kind: Any) -> bool:
    """Whether a value from JSON has a field's type: int, float, str, dict[str, ...], or one of several."""
    if kind is Any or isinstance(kind, UnionType):
        return kind is Any or any(_is(value, one) for one in get_args(kind))
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else get_origin(kind) or kind):
        return False
    return not isinstance(value, dict) or all(_is(inner, get_args(kind)[1]) for inner in value.values())


def read(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """{name: tensor} of weights and statistics, and {parameter name: whole velocity}."""
    return load_file(checkpoint / _FILES[0]), load_file(checkpoint / _FILES[1])


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


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _sha256(file: Path) -> str:
    if (stream := open_regular(file)) is None:
        raise FileNotFoundError(f"{file.name} is gone")
    with stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
