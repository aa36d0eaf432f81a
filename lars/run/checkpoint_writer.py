"""Writes a run's checkpoints in the background, reads each back, and keeps the newest whole ones."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lars.recipe.keys import Checkpoint
from lars.run.checkpoint import FILES, State, damage, name_of, saved, sha256, top1_of
from lars.run.folder import NotWritten, write_atomically
from lars.run.lock import LockLost

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes checkpoints of a run in the background, one at a time; training waits for the copy to the host only."""

    def __init__(self, run: Path, keys: Checkpoint, may_write: Callable[[], None] = lambda: None) -> None:
        """`may_write` raises LockLost once the run folder belongs to another process."""
        self.folder, self.keep, self.keep_best = run / "checkpoints", keys.keep, keys.keep_best
        self.stop_on_error = keys.on_error == "stop"
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
        if self._is_whole(self.folder / name_of(state.step)):  # stopped before the next step ended
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
        target = self.folder / name_of(state.step)
        # A name of its own: whoever takes the folder over may be at this step too.
        temporary = self.folder / f".{target.name}-{uuid.uuid4().hex}"
        try:
            self.may_write()
            for left_behind in self.folder.glob(".step-*"):
                shutil.rmtree(left_behind)
            temporary.mkdir(parents=True)
            state.format = 2
            for name, tensors in zip(FILES, (weights, momentum)):
                save_file(tensors, temporary / name)
                state.files[name] = sha256(temporary / name)
            (temporary / "state.json").write_text(json.dumps(asdict(state), indent=1))
            (temporary / "state.sha256").write_text(sha256(temporary / "state.json") + "\n")
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
            for old in self._superseded():
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

    def _superseded(self) -> list[Path]:
        """All whole ones but the newest and, if it is to stay, the best, which the file `best` names."""
        there = saved(self.folder.parent)
        best = max(there, key=top1_of) if self.keep_best else None
        if best is not None:
            write_atomically(self.folder / "best", best.name + "\n")
        return [old for old in there[: -self.keep] if old != best]

    def _is_whole(self, checkpoint: Path) -> bool:
        """Read at most once by a process; False where there is none, too."""
        if checkpoint.is_dir() and checkpoint not in self.whole and not damage(checkpoint):
            self.whole.add(checkpoint)
        return checkpoint.is_dir() and checkpoint in self.whole

    def _put_aside(self, damaged: Path) -> None:
        """Out of the way of rotation and resume, for whoever wants to know what happened to it."""
        place = damaged.with_name(f"damaged-{damaged.name}")
        shutil.rmtree(place, ignore_errors=True)
        os.rename(damaged, place)
        log.warning("%s is damaged: it is kept as %s", damaged, place.name)

    def _read_back(self, target: Path, *written: dict[str, Tensor]) -> None:
        """What a resume would find must be what memory holds, else the checkpoint is put aside and OSError raised."""
        why = damage(target)
        for name, tensors in zip(FILES, written) if not why else ():
            found = load_file(target / name)
            same = (torch.equal(_bits(found[key]), _bits(tensor)) for key, tensor in tensors.items())
            if found.keys() != tensors.keys() or not all(same):
                why = f"{name} holds other tensors"
        if why:
            self._put_aside(target)
            raise OSError(f"it does not read back as it was written ({why})")
        self.whole.add(target)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
