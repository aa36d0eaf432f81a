"""The run folder: what a run was, how far it is, and the hashes by which a stranger checks it."""
from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from lars import portable
from lars.batch import BatchPlan
from lars.config import Recipe, RecipeError, model_files
from lars.lock import LockLost, RunLock
from lars.reading import diverged, read_bytes, read_lines, read_object, read_result  # noqa: F401 - for scripts, too

log = logging.getLogger("lars")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MOST_SAMPLES = 1 << 34  # bytes of ledger.jsonl
_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "deepspeed", "datasets", "pyarrow", "numpy", "pillow")


class NotWritten(OSError):
    """The run folder's disk does not take what the run has to keep; another start goes on once it does."""


class RunFolder:
    """Writes `config.yaml`, `metrics.jsonl`, `ledger.jsonl` and `result.json`; on other ranks than 0 it writes nothing."""

    def __init__(self, recipe: Recipe, writes: bool) -> None:
        self.path = Path(recipe.run_dir)
        self.writes = writes
        self.lock = RunLock(self.path)
        self.tracker: Callable[..., None] | None = None  # accelerate's `log`, which sends numbers to all trackers
        self.result: dict[str, Any] = {}
        self.pending: list[tuple[Path, str]] = []  # lines for which the disk had no room yet
        self.trouble = ""  # why a write has failed

    def open(self, recipe: Recipe, files: dict[str, str], step: int, evaluation: dict[str, float], facts: dict[str, Any]) -> None:
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

    def log(self, kind: str, **values: Any) -> None:
        """Append a line to metrics.jsonl; `result.json` is refreshed with evaluations and at most once a second.

        Trackers get the numbers of training and evaluation as train/loss, eval/top1 and so on.
        """
        if kind == "eval":
            self.result.update(top1=values["top1"], top5=values["top5"])
        self.append("metrics.jsonl", {"kind": kind, **values})
        if self.tracker and kind in ("train", "eval"):
            numbers = {f"{kind}/{key}": value for key, value in values.items() if key not in ("step", "epoch")}
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
                    if status != "failed":
                        raise NotWritten(f"{self.path} takes no more ({self.trouble}): make room and start the same command again")
        except (LockLost, NotWritten) as error:  # without the lock, what stands there is another process's
            if isinstance(error, NotWritten) and status != "failed":
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
            NotWritten: it is not room that is lacking.
        """
        try:
            write()
            return True
        except OSError as error:
            if error.errno not in _FULL:
                raise NotWritten(f"{self.path} cannot be written ({error}): give another run_dir=...") from None
            if not self.trouble:
                log.warning("%s cannot be written (%s): what belongs there is kept until it can", self.path, error.strerror)
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


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader or a crash sees the old or the new content, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


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

    A damaged line goes too, with a warning: the run itself rests on its checkpoint, not on the log.
    """
    if (content := read_bytes(path, _MOST_SAMPLES)) is None:
        return
    kept, damaged, lines = [], 0, content.splitlines(keepends=True)
    for line in lines:
        try:
            values = json.loads(line)
            again = values.get("kind") == "eval" and values["step"] == step and not evaluated
            if line.endswith(b"\n") and values["step"] <= step and not again:
                kept.append(line.decode())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            damaged += line is not lines[-1]
    if damaged:
        log.warning("%s: %d damaged lines are dropped", path, damaged)
    write_atomically(path, "".join(kept))


def unwrapped_name(name: str) -> str:
    """A state dict's name without the prefixes of DDP and torch.compile."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def weights_sha256(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over a state dict: names sorted; each name in UTF-8, then its contiguous little-endian bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted((unwrapped_name(name), tensor) for name, tensor in state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def sources(config: Path) -> dict[str, str]:
    """{file: SHA-256} of what decides a run besides the recipe's keys: `lars/`, `train.py`, the recipe's own folder."""
    library, folder = Path(__file__).parent, config.resolve().parent
    train = folder / "train.py" if (folder / "train.py").is_file() else folder.parent / "train.py"
    files = {f"lars/{p.relative_to(library)}": p for p in library.rglob("*.py")}
    files.update({f"recipe/{p.name}": p for p in (*folder.glob("*.py"), config)})
    files.update({f"{p.parent.name}/{p.name}": p for p in model_files.get(folder / "model.py", [])})
    if train.is_file():
        files["train.py"] = train
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in sorted(files.items())}


def changed_sources(run: Path, now: dict[str, str]) -> list[str]:
    """The files in which `now`, what `sources` gives, differs from what made the steps of a run so far.

    Raises:
        RecipeError: its `sources.json` is damaged.
    """
    then = read_object(run / "sources.json")
    return sorted(name for name in {*now, *then} if now.get(name) != then.get(name))


def source_sha256(files: dict[str, str]) -> str:
    """One SHA-256 over what `sources` gave."""
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def commit() -> str | None:
    """The commit that is checked out where this library lies, with "+" if files of it were changed since; None without git."""
    try:
        git = ["git", "-C", str(Path(__file__).parents[1])]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
        return head + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """The numeric environment: where these agree, the promise of one hash holds."""
    found = {"threads": torch.get_num_threads(), "torch": torch.__version__, "python": sys.version.split()[0], "system": platform.system()}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = {"device": torch.cuda.get_device_name(device), "instructions": f"sm_{major}{minor}"}
        return {**name, "cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda, **found}
    name, flags = portable.cpu()
    return {"device": name, "instructions": torch.backends.cpu.get_cpu_capability(), "cpu_flags": flags, **found}


def versions() -> dict[str, str]:
    """Installed versions of the packages that a run rests on."""
    return portable.versions(_PACKAGES)
