"""A child process that ends with its parent, whatever ends that one, and whatever has stopped the child."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable

import pyarrow as pa

_C = ctypes.CDLL(None)
_prctl, _PR_SET_PDEATHSIG = getattr(_C, "prctl", None), 1  # Linux has it
_mallopt, _M_MMAP_THRESHOLD = getattr(_C, "mallopt", None), -3  # glibc has it


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child that ends with its parent and leaves signals to it: launchers signal process groups."""
    parent, lasting = os.getpid(), threading.current_thread() is threading.main_thread()
    with warnings.catch_warnings():
        # It warns of the parent's threads: the child uses nothing that they may hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        # The kernel counts the end of the thread that forked, and its SIGKILL reaches a stopped process too.
        if _prctl and lasting:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def frugally(work: Callable[[], None]) -> None:
    """In a process that gives memory back to the system as soon as it is freed.

    A reader holds images of some 100 kB, taken one by one out of row groups of megabytes: malloc and Arrow's own
    allocator would keep the gaps between them, as much again.
    """
    if _mallopt:
        _mallopt(_M_MMAP_THRESHOLD, 1 << 15)  # bytes; a larger piece is a mapping of its own
    pa.set_memory_pool(pa.system_memory_pool())
    work()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)
