"""What glibc's malloc does with freed memory: whether the next tensor finds it, or the system has it back.

By default a large piece is a mapping of its own, and every new one begins with a page fault for each of its pages. No
number depends on any of this. Other C libraries are left alone.
"""

from __future__ import annotations

import ctypes

import pyarrow as pa

_mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h


def keep_freed() -> None:
    """For a process that trains on a CPU: each step frees what the next one takes again."""
    _mallopt(_MMAP_MAX, 0)
    _mallopt(_TRIM_THRESHOLD, -1)


def return_freed() -> None:
    """For a reader, which holds images of some 100 kB that are taken one by one out of row groups of megabytes.

    malloc and Arrow's own allocator would keep the gaps between them, as much again.
    """
    _mallopt(_MMAP_MAX, 1 << 16)  # mappings, glibc's default
    _mallopt(_MMAP_THRESHOLD, 1 << 15)  # bytes; a larger piece is a mapping of its own
    _mallopt(_TRIM_THRESHOLD, 1 << 17)
    pa.set_memory_pool(pa.system_memory_pool())
