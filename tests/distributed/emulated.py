"""`qemu-x86_64 -cpu Haswell-v4 python -m tests.distributed.emulated --config ...`: train.py on a CPU that is emulated.

The loader forks its processes, and footers are looked at in a fork. In qemu 7.2 a forked process cannot start a thread
if one of its parent's threads is newer than the one that forked: it gives that one's number once more. So here, and
only here, a new thread forks.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from recipes import train  # isort: skip  (first: it pins the instruction set before torch is imported)
from lars.data import forked, loader

fork = forked.fork


def fork_from_a_new_thread(work: Callable[[], None]) -> int:
    """What `fork` does; the child never leaves that call."""
    children: list[int] = []
    thread = threading.Thread(target=lambda: children.append(fork(work)))
    thread.start()
    thread.join()
    return children[0]


if __name__ == "__main__":
    loader.fork = forked.fork = fork_from_a_new_thread
    sys.exit(train.main())
