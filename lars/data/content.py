"""The bytes behind a footer: a hash of each row group, taken whenever it is read and compared with every time before.

Footers tell names, rows and sizes; labels permuted in place, or another node's images, leave them as they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from blake3 import blake3

from lars.data.forked import shared_array

_HASH = np.dtype("<i8")  # two of them


def row_group_hash(data: bytes | memoryview) -> bytes:
    """32 bytes of BLAKE3: on every image that is trained on, SHA-256 would cost more than 3 % of the loader's rate."""
    return blake3(data).digest()


class Content:
    """Hashes of a split's row groups, zero where none is known, in memory that readers and the training process share.

    `seen` is what this process's readers read, `known` what all processes have read, in this run and before. Each array
    has one side that writes it, and no lock.
    """

    def __init__(self, groups: int) -> None:
        self.seen, self.known = shared_array(_HASH, 2, groups, 2)

    def see(self, group: int, digest: bytes) -> bool:
        """Keep the first 16 bytes of what a row group hashes to; False if it is not what was read before."""
        first, second = np.frombuffer(digest, _HASH, 2).tolist()
        hashed = [first or 1, second]
        if any(array[group, 0] and array[group].tolist() != hashed for array in (self.known, self.seen)):
            return False
        self.seen[group, 1] = second
        self.seen[group, 0] = hashed[0]  # last: it says that both are there
        return True

    def read(self) -> np.ndarray:
        """int64 (row groups, 2): what is known here."""
        return np.where(self.seen[:, :1] == 0, self.known, self.seen)

    def learn(self, hashes: np.ndarray) -> None:
        """Take over what other processes, or this run before it was resumed, have read."""
        self.known[:] = hashes

    def kept(self) -> str:
        """`known` for a checkpoint."""
        return f"blake3:{self.known.tobytes().hex()}"

    def recall(self, kept: str) -> None:
        """The other way round; an empty text, from a checkpoint of before it came, knows nothing."""
        if found := re.fullmatch(f"blake3:([0-9a-f]{{{2 * self.known.nbytes}}})", str(kept)):
            self.learn(np.frombuffer(bytes.fromhex(found[1]), _HASH).reshape(-1, 2))


def content_fingerprint(contents: Sequence[Content]) -> str | None:
    """One SHA-256 over all row groups, in order; None until each of them has been read."""
    if not all(content.known[:, 0].all() for content in contents):
        return None
    return hashlib.sha256(" ".join(content.kept() for content in contents).encode()).hexdigest()
