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

_prctl, _PR_SET_PDEATHSIG = getattr(ctypes.CDLL(None), "prctl", None), 1  # Linux has it


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


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)
