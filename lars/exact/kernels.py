"""kernels.c, which `pip install` builds where there is a C compiler; without one the plain path gives the same bits."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache
from pathlib import Path

_MEMORY = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64  # addresses of two tensors, and their elements


@cache
def kernels() -> ctypes.CDLL | None:
    """What was built beside this file; None if nothing was."""
    for file in Path(__file__).parent.glob("_kernels*.so"):
        with suppress(OSError, AttributeError):  # of another machine or an older version
            built = ctypes.CDLL(str(file))
            built.lars_add_pass.argtypes = *_MEMORY, ctypes.c_float, ctypes.c_float, ctypes.c_int32
            built.lars_mean.argtypes = *_MEMORY, ctypes.c_double
            built.lars_pixels.argtypes = ctypes.c_void_p, *_MEMORY, ctypes.c_int64, ctypes.c_int32
            return built
    return None
