"""kernels.c, which `pip install` builds where there is a C compiler; without one the plain path gives the same bits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

from torch import Tensor

_POINTER, _LENGTH, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Kernels:
    """The functions of kernels.c; every tensor is contiguous and on the CPU."""

    def __init__(self, built: ctypes.CDLL) -> None:
        self._add_pass: Callable[..., int] = built.lars_add_pass
        self._add_pass.argtypes = [_POINTER, _POINTER, _LENGTH, ctypes.c_float, ctypes.c_float, _FLAG]
        self._mean: Callable[..., None] = built.lars_mean
        self._mean.argtypes = [_POINTER, _POINTER, _LENGTH, ctypes.c_double]

    def add_pass(self, gradient: Tensor, total: Tensor, scale: float, limit: float, store: bool) -> bool:
        """Add round(gradient * scale) to `total`, int64, or store it there; whether all elements are below `limit`."""
        where = gradient.data_ptr(), total.data_ptr(), gradient.numel()
        return not self._add_pass(*where, scale, limit, store)

    def mean(self, total: Tensor, mean: Tensor, factor: float) -> None:
        """mean = total * factor, from int64 by way of float64 to float32."""
        self._mean(total.data_ptr(), mean.data_ptr(), total.numel(), factor)


@cache
def kernels() -> Kernels | None:
    """What was built beside this file; None if nothing was."""
    for file in Path(__file__).parent.glob("_kernels*.so"):
        try:
            return Kernels(ctypes.CDLL(str(file)))
        except (OSError, AttributeError):  # of another machine or an older version
            continue
    return None
