"""Child processes that end with their parent, whatever ends that one or has stopped them, and memory that all share.

`from_a_child` is for what reads bytes that C++ may not survive: pyarrow ends its whole process on some damaged footers
and on encrypted columns, scipy on some MATLAB files.
"""

from __future__ import annotations

import ctypes
import faulthandler
import math
import mmap
import os
import pickle
import resource
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

import numpy as np

from lars.recipe.refusal import RecipeError

T = TypeVar("T")
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


def shared_array(kind: type | np.dtype, *shape: int) -> np.ndarray:
    """Zeros in memory that this process shares with all that it forks; it has no name, and begins at a page."""
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(1, count * np.dtype(kind).itemsize))
    return np.frombuffer(memory, kind, count).reshape(shape)


def from_a_child(results: Iterable[T]) -> list[T]:
    """Results that a child of this process draws; those before the one over which it ended, if it did.

    Raises:
        RecipeError: from drawing them; anything else ends the child.
    """
    inlet, outlet = os.pipe()

    def tell() -> None:
        # What C++ says when it aborts helps nobody, nor does a core file.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with os.fdopen(outlet, "wb") as stream:
            try:
                for result in results:
                    pickle.dump(result, stream)
                    stream.flush()
            except RecipeError as error:
                pickle.dump(error, stream)

    child = fork(tell)
    os.close(outlet)
    found: list[T] = []
    with os.fdopen(inlet, "rb") as stream, suppress(EOFError, pickle.UnpicklingError):
        while True:
            found.append(pickle.load(stream))  # written by our own child
    os.waitpid(child, 0)
    if found and isinstance(found[-1], RecipeError):
        raise found[-1]
    return found


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)
