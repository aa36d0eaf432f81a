"""One writer for a run folder, on any file system: a file that its owner counts up.

No `flock`: shared file systems of clusters leave it out or emulate it on one node. The file is made with O_EXCL and
holds a token. Its owner counts up every few seconds, and reads its token back before every write; so an owner that was
suspended notices that another process has taken over. A lock is dead once its process is gone from this machine, or
once its count has stood still for a minute of the observer's own time.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from lars.recipe.refusal import RecipeError
from lars.run.reading import read_bytes

log = logging.getLogger("lars")

COUNT_EVERY, DEAD_AFTER = 5.0, 60.0  # seconds
_MOST_BYTES = 1 << 12
_DIGITS = 20  # of the count, which stands first, so that it is rewritten in place in one write


class LockLost(RuntimeError):
    """Another process writes this run folder now; this one must not touch it any more."""


class RunLock:
    """The right to write one run folder, held from `acquire` to `release`."""

    def __init__(self, folder: Path, key: str = "run_dir") -> None:
        """`key` is what the user gave the folder as, for errors."""
        self.key = key
        self.file, self.token, self.count = folder / "lock", uuid.uuid4().hex, 0
        self.handle: int | None = None
        self.ended = threading.Event()
        self.counting = threading.Lock()

    def acquire(self) -> None:
        """Take the lock, from a dead owner if need be; that can take a minute where the owner ran on another machine.

        Raises:
            RecipeError: another process writes this folder, or nobody can.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._wait_until_dead()
        except OSError as error:
            why = f"cannot be written ({error.strerror}): give another {self.key}"
            raise RecipeError(f"{self.key}={self.file.parent} {why}") from None
        threading.Thread(target=self._keep_counting, daemon=True).start()

    def check(self) -> None:
        """Before every write: count up, unless the lock is another one's by now.

        Raises:
            LockLost: it is.
        """
        with self.counting:
            if self.handle is None:
                return
            if not (found := _read(self.file)) or found["token"] != self.token:
                owner = f"{_who(found)} has taken it over" if found else "its lock file is gone"
                raise LockLost(
                    f"{self.file.parent} is not this process's any more: {owner}. It was suspended for too long"
                )
            self.count += 1
            os.pwrite(self.handle, f"{self.count:0{_DIGITS}d}".encode(), 0)

    def release(self) -> None:
        """Give the lock back; one that was lost stays where it is."""
        self.ended.set()
        with self.counting:
            if self.handle is None:
                return
            os.close(self.handle)
            self.handle = None
            if (found := _read(self.file)) and found["token"] == self.token:
                self.file.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            self.handle = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        except FileExistsError:
            return False
        owner = {"token": self.token, "host": socket.gethostname(), "machine": _machine()}
        owner |= {"pid": os.getpid(), "started": _started(os.getpid())}
        os.pwrite(self.handle, f"{self.count:0{_DIGITS}d}\n{json.dumps(owner)}\n".encode(), 0)
        return True

    def _wait_until_dead(self) -> None:
        """Return once the lock that is there is no more."""
        first, started, said = _read(self.file), time.monotonic(), False
        while first and (found := _read(self.file)) and found["token"] == first["token"]:
            if found["count"] != first["count"]:
                remedy = f"wait for it, or give another {self.key}"
                raise RecipeError(f"{self.file.parent} is being written by {_who(found)}: {remedy}")
            waited = time.monotonic() - started
            if _process_is_gone(found) or waited > DEAD_AFTER:
                return self._remove(found)
            if not said and waited > 2 * COUNT_EVERY:
                said = True
                log.warning(
                    "%s is locked by %s; it counts as dead after %.0f s", self.file.parent, _who(found), DEAD_AFTER
                )
            time.sleep(0.2)

    def _remove(self, dead: dict[str, Any]) -> None:
        """Take a dead lock away. Of several observers only the one that makes the claim may, and it looks again after
        that: the lock may be a faster observer's by then."""
        claim = self.file.with_name(f"lock-after-{dead['token']}")
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            self._wait_for_claim(claim)
            return
        try:
            if (_read(self.file) or {}).get("token") == dead["token"]:
                self.file.unlink()
        finally:
            claim.unlink(missing_ok=True)

    def _wait_for_claim(self, claim: Path) -> None:
        """Until the observer that made it is done; one that was killed in between leaves it behind."""
        started = time.monotonic()
        while claim.exists():
            if time.monotonic() - started > DEAD_AFTER:
                claim.unlink(missing_ok=True)
            time.sleep(0.02)

    def _keep_counting(self) -> None:
        while not self.ended.wait(COUNT_EVERY):
            try:
                self.check()
            except LockLost:  # the next write says so
                return


def _read(file: Path) -> dict[str, Any] | None:
    """Owner and count of a lock file; None if there is none."""
    for _ in range(50):
        try:
            if (content := read_bytes(file, _MOST_BYTES)) is None:
                return None
            count, _, owner = content.decode().partition("\n")
            told = json.loads(owner)
            found = {key: told[key] for key in ("token", "host", "machine", "pid", "started")}
            if not str(found["token"]).isalnum() or type(found["pid"]) is not int:
                raise ValueError("no lock of a run")
            return {**found, "count": int(count)}
        except RecipeError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno != errno.ELOOP:
                raise error.__cause__ from None  # it may be another user's, who lives
            time.sleep(0.02)
        except (ValueError, LookupError, TypeError, RecursionError):  # made a moment ago and still empty
            time.sleep(0.02)
    return {"token": "unreadable", "host": "an unknown host", "pid": 0, "started": None, "machine": "", "count": 0}


def _machine() -> str:
    """This boot of this machine, and the namespace of its process numbers (a container has its own)."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: only the count tells
        return ""


def _started(pid: int) -> str | None:
    """When a process of this machine began, in ticks since the boot; None if it is gone, or seen only by its parent."""
    try:  # the name, in brackets, may hold anything; after it come the state and 18 more fields before this one
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _process_is_gone(owner: dict[str, Any]) -> bool:
    known = owner["machine"] and owner["machine"] == _machine()
    return bool(known) and _started(owner["pid"]) != owner["started"]


def _who(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}"
