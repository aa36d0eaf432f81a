"""The run folder: what a run was, how far it is, and the hashes by which a stranger checks it."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from omegaconf import OmegaConf

from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe
from lars.recipe.refusal import RecipeError
from lars.run.lock import LockLost, RunLock
from lars.run.reading import open_regular, read_result
from lars.run.sources import commit, source_sha256, versions

log = logging.getLogger("lars")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MOST_LINE = 1 << 26  # bytes: seven million sample ids of a step


class NotWritten(OSError):
    """The run folder's disk does not take what the run has to keep; another start goes on once it does."""


class RunFolder:
    """Writes `config.yaml`, `metrics.jsonl`, `ledger.jsonl` and `result.json`; ranks other than 0 write nothing."""

    def __init__(self, recipe: Recipe, writes: bool) -> None:
        self.path, self.name = Path(recipe.run_dir), recipe.name
        self.writes = writes
        self.lock = RunLock(self.path)
        self.tracker: Callable[..., None] | None = None  # accelerate's `log`, which sends numbers to all trackers
        self.result: dict[str, Any] = {}
        self.pending: list[tuple[Path, str]] = []  # lines for which the disk had no room yet
        self.trouble = ""  # why a write has failed

    def open(
        self, recipe: Recipe, files: dict[str, str], step: int, evaluation: dict[str, float], facts: dict[str, Any]
    ) -> None:
        """Begin or resume at `step`: lines after it are cut off the JSON-lines files; status becomes `running`.

        The evaluation of `step` itself is cut too if it is not `evaluation`, the checkpoint's last one: it comes again.
        `files` are from `sources`.
        """
        before = read_result(self.path) if step and self.writes else {}
        self.result = {
            "recipe": recipe.name,
            "status": "running",
            "heartbeat": None,
            "top1": evaluation.get("top1"),
            "top5": evaluation.get("top5"),
            "steps": step,
            "epochs": None,
            "images": step * recipe.global_batch,
            "seconds": before.get("seconds", 0.0),
            "images_per_second": before.get("images_per_second"),
            "weights_sha256": None,
            "samples_hash": None,
            "source_sha256": source_sha256(files),
            "content_fingerprint": None,
            "commit": commit() if self.writes else None,
            "versions": versions(),
            **facts,
        }
        if not self.writes:
            return
        self.lock.check()
        try:
            write_atomically(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(recipe)))
            write_atomically(self.path / "sources.json", json.dumps(files, indent=1) + "\n")
            for name in ("metrics.jsonl", "ledger.jsonl"):
                _cut_back(self.path / name, step, evaluated=evaluation.get("step") == step)
            self._write_result()
        except NotWritten as error:
            raise RecipeError(str(error)) from None
        except OSError as error:
            raise RecipeError(f"{self.path} cannot be written ({error}): give another run_dir=...") from None

    @property
    def made(self) -> dict[str, Any]:
        """How the steps so far were made, for a checkpoint."""
        return {key: self.result[key] for key in ("reproducibility", "environment")}

    @property
    def what_next(self) -> str:
        """What people do with a run that has finished."""
        return "\n".join(f"  lars {verb} {self.path}" for verb in ("evaluate", "export", "report"))

    def say(self, text: str) -> None:
        """A line on the terminal, from the process that writes the folder."""
        if self.writes:
            print(f"{self.name}: {text}", flush=True)

    def log(self, kind: str, also: dict[str, float] | None = None, **values: Any) -> None:
        """Append a line to metrics.jsonl; `result.json` is refreshed with evaluations and at most once a second.

        Trackers get the numbers of training and evaluation as train/loss, eval/top1 and so on, and those of `also`.
        """
        if kind == "eval":
            self.result.update(top1=values["top1"], top5=values["top5"])
        self.append("metrics.jsonl", {"kind": kind, **values})
        if self.tracker and kind in ("train", "eval"):
            told = {**values, **(also or {})}
            numbers = {f"{kind}/{key}": value for key, value in told.items() if key not in ("step", "epoch")}
            self.tracker(numbers, step=values["step"])
        if self.writes and (kind == "eval" or time.time() - (self.result["heartbeat"] or 0) > 1):
            self._write_result()

    def append(self, name: str, line: dict[str, Any]) -> None:
        if self.writes:
            self.lock.check()
            self.pending.append((self.path / name, json.dumps(line) + "\n"))
            self._keep(self._write_lines)

    def end(self, status: str, **values: Any) -> None:
        """Write the final `result.json`: finished, preempted or failed. Before `open` there is nothing to end.

        Raises:
            NotWritten: there is no room for it, nor was there in the seconds after.
        """
        try:
            if self.writes and self.result:
                self.result.update(status=status, **values)
                for wait in (0, 1, 2, 3, 4):  # what failed before may be cleared away in a moment
                    time.sleep(wait)
                    if all([self._keep(self._write_lines), self._write_result()]):
                        break
                else:
                    remedy = "make room and start the same command again"
                    raise NotWritten(f"{self.path} takes no more ({self.trouble}): {remedy}")
        except LockLost:  # what stands there is another process's
            pass
        except NotWritten:
            if status != "failed":
                raise
        self.lock.release()

    def _write_result(self) -> bool:
        self.lock.check()
        self.result["heartbeat"] = time.time()
        text = json.dumps(self.result, indent=1) + "\n"
        return self._keep(lambda: write_atomically(self.path / "result.json", text))

    def _write_lines(self) -> None:
        while self.pending:
            _append(*self.pending[0])
            del self.pending[0]

    def _keep(self, write: Callable[[], None]) -> bool:
        """Write, or warn that it is kept until there is room again: a full disk costs no step.

        Raises:
            NotWritten: something else than room is missing.
        """
        try:
            write()
            return True
        except OSError as error:
            if error.errno not in _FULL:
                raise NotWritten(f"{self.path} cannot be written ({error}): give another run_dir=...") from None
            if not self.trouble:
                log.warning("%s cannot be written (%s): all is kept until it can be", self.path, error.strerror)
            self.trouble = error.strerror or str(error)
            return False


def position(step: int, plan: BatchPlan, seconds: float, samples_hash: int) -> dict[str, Any]:
    """Where a run stands, as `result.json` tells it."""
    images = step * plan.global_batch
    return {
        "steps": step,
        "epochs": round(images / plan.samples, 4),
        "images": images,
        "seconds": round(seconds, 2),
        "images_per_second": round(images / seconds, 1) if seconds else None,
        "samples_hash": f"{samples_hash:016x}",
    }


def set_aside(path: Path) -> Path:
    """Move a run folder out of the way and return its new place."""
    number = 1
    while (target := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    shutil.move(path, target)
    return target


def write_atomically(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Replace a file so that a reader or a crash sees the old or the new content, never a part."""
    parts = (content.encode(),) if isinstance(content, str) else (content,) if isinstance(content, bytes) else content
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as stream:  # where a link lies, "wb" would write into the file that it names
            stream.writelines(parts)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _append(path: Path, text: str) -> None:
    """The whole text or nothing of it."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as stream:
            stream.write(text)
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def _cut_back(path: Path, step: int, evaluated: bool) -> None:
    """Drop lines of later steps (an evaluation that comes again is one), and a last line that a crash left unfinished.

    A damaged line goes too, with a warning: the run itself rests on its checkpoint, not on the log. One line at a time
    is in memory: `ledger.jsonl` of an ImageNet run has a gigabyte.
    """
    damaged = 0

    def kept(stream: BinaryIO) -> Iterator[bytes]:
        nonlocal damaged
        while line := stream.readline(_MOST_LINE):
            try:
                values = json.loads(line)
                again = values.get("kind") == "eval" and values["step"] == step and not evaluated
                if line.endswith(b"\n") and values["step"] <= step and not again:
                    yield line
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                damaged += line.endswith(b"\n")

    if (stream := open_regular(path)) is not None:
        with stream:
            write_atomically(path, kept(stream))
    if damaged:
        log.warning("%s: %d damaged lines are dropped", path, damaged)


def weights_sha256(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over a state dict: names sorted; each name in UTF-8, then its contiguous little-endian bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
