"""The encoded samples of one process: a row group is read once, ahead of its use, and gives up samples one by one."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import psutil
import pyarrow.parquet as pq

from lars.data.content import row_group_hash
from lars.data.footers import Footer, check_label_range, check_no_null, parse_footer, span_of
from lars.data.index import Index
from lars.data.row_group import DAMAGED, parse
from lars.data.source import DataError, Source, size_in
from lars.recipe.keys import Data
from lars.recipe.refusal import RecipeError, one_line

log = logging.getLogger("lars")

_AT_ONCE = 4  # row groups that are read at the same time
_SPARE = 64 * 2**20  # bytes that may be read ahead beyond what is needed
# Seconds after which a remote file's state is asked again, where a read does not tell that it changed.
_ASK_AGAIN = 60.0

Key = tuple[int, int]  # epoch, row group
Pass = tuple[np.ndarray, np.ndarray]  # ids, and the epoch of each


@dataclass
class Samples:
    """What one pass consumes, in slot order."""

    ids: np.ndarray
    epochs: np.ndarray
    images: list[bytes | None]
    labels: np.ndarray


@dataclass
class _Group:
    images: dict[int, bytes | None]  # row -> bytes, of the samples that are still to be taken
    labels: np.ndarray


def memory_share() -> int:
    """Bytes that a process's row groups may take: half of what is free, shared with the other ranks of this machine."""
    return psutil.virtual_memory().available // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def check_memory(index: Index) -> None:
    """Raise RecipeError if a row group alone takes more than a process may have."""
    group, share = int(np.argmax(index.memory)), memory_share()
    if index.memory[group] > share:
        raise RecipeError(
            f"{index.place(group)} takes {index.memory[group] / 2**20:,.0f} MiB of memory, of which a process may have "
            f"{share / 2**20:,.0f} MiB: write smaller row groups (`lars convert`), or use fewer processes a machine"
        )


class Reader:
    """Serves passes in their order; `needed` is the number of bytes of row groups that they use at the same time."""

    def __init__(
        self, index: Index, data: Data, num_classes: int, remaining: Callable[[int], np.ndarray], needed: float
    ) -> None:
        """`remaining(epoch)`, bool (samples,): what will be taken in an epoch; nothing else is kept of a row group."""
        self.index, self.data, self.num_classes, self.content = index, data, num_classes, index.content
        self.source: Source | None = None  # connections are made by the process that reads
        self.remaining = remaining
        self.wanted: dict[int, np.ndarray] = {}
        self.needed, self.limit = needed, min(memory_share(), int(1.25 * needed) + _SPARE)
        self.pool = ThreadPoolExecutor(_AT_ONCE)
        self.held: OrderedDict[Key, Future[_Group]] = OrderedDict()  # the last one used stands last
        self.sizes: dict[Key, float] = {}  # bytes of each held row group that are still to be taken, first estimated
        self.warned = False
        self.footers: dict[int, pq.FileMetaData] = {}
        self.opening = threading.Lock()  # several reads of one file at a time need its footer once
        self.asked: dict[int, float] = {}  # file -> when its state was asked for
        self.whole = lru_cache(1)(self._read)  # the row group of a bad image, which is read again for its neighbours
        self.reads = 0  # row groups read so far

    def samples(self, passes: Iterable[Pass]) -> Iterator[Samples]:
        """All passes; row groups of later ones are read meanwhile, as far as memory allows.

        Raises:
            DataError: a file cannot be read, is damaged or has changed.
            RecipeError: a label is out of range.
        """
        self.source = Source(self.index.files[0], self.data.retry_seconds)
        passes, planned, waiting = iter(passes), deque(), None
        while True:
            while (waiting := waiting or next(passes, None)) and self._plan(*waiting, must=not planned):
                planned.append(waiting)
                waiting = None
            if not planned:
                return
            yield self._take(*planned.popleft())

    def neighbour(self, group: int, row: int) -> tuple[bytes | None, int]:
        """Bytes and label of any row: what stands in for a bad image."""
        images, labels, _ = self.whole(group)
        return images[row], int(labels[row])

    def where(self, group: int, row: int) -> str:
        """Where a person finds an image: its name in the data set, and its place."""
        place = f"row {row} of {self.index.place(group)}"
        with suppress(DataError, RecipeError, MemoryError):  # the name is a favour
            if path := self.whole(group)[2][row]:
                return f"{path!r}, {place}"
        return place

    def _plan(self, ids: np.ndarray, epochs: np.ndarray, must: bool) -> bool:
        """Start the reads of a pass; False if there is no memory for them now. The next pass to take `must` have it."""
        keys = [k for k in self._keys(ids, epochs) if k not in self.held]
        size = sum(map(self._size, keys))
        if keys and sum(self.sizes.values()) + size > self.limit:
            if not must:
                return False
            self._make_room(size, keep=set(self._keys(ids, epochs)))
        for key in keys:
            self._start(key)
        return True

    def _keys(self, ids: np.ndarray, epochs: np.ndarray) -> list[Key]:
        return list(dict.fromkeys(zip(epochs.tolist(), self.index.group_of(ids).tolist())))

    def _size(self, key: Key) -> float:
        return float(self.index.memory[key[1]]) * float(self._rows_wanted(key).mean())

    def _rows_wanted(self, key: Key) -> np.ndarray:
        epoch, group = key
        if epoch not in self.wanted:
            self.wanted[epoch] = self.remaining(epoch)
        first = int(self.index.first_row[group])
        return self.wanted[epoch][first : first + int(self.index.rows[group])]

    def _start(self, key: Key) -> None:
        self.reads += 1
        self.sizes[key] = self._size(key)
        self.held[key] = self.pool.submit(self._load, key, np.flatnonzero(self._rows_wanted(key)))

    def _make_room(self, size: float, keep: set[Key]) -> None:
        """Give up what was used last: lanes take turns, so it is what will be used last again."""
        for key in list(reversed(self.held)):
            if sum(self.sizes.values()) + size <= self.limit:
                return
            if key in keep or not self.held[key].done():
                continue
            del self.held[key], self.sizes[key]
            if not self.warned:
                self.warned = True
                log.warning(
                    "row groups are read more than once: the slots of this process use %.1f GiB of them at a time, and "
                    "%.1f GiB of memory may be taken for them; more memory or more machines make it faster",
                    self.needed / 2**30,
                    self.limit / 2**30,
                )

    def _take(self, ids: np.ndarray, epochs: np.ndarray) -> Samples:
        for past in [epoch for epoch in self.wanted if epoch < epochs[0]]:
            del self.wanted[past]
        groups = self.index.group_of(ids)
        rows = (ids - self.index.first_row[groups]).tolist()
        images, labels = [], np.empty(len(ids), np.int64)
        for key in self._keys(ids, epochs):
            if key not in self.held:  # given up since it was planned
                self._make_room(self._size(key), keep={key})
                self._start(key)
            self.held.move_to_end(key)
        for slot, (key, row) in enumerate(zip(zip(epochs.tolist(), groups.tolist()), rows)):
            group = self.held[key].result()
            images.append(group.images.pop(row))
            labels[slot] = group.labels[row]
            self.wanted[key[0]][ids[slot]] = False
            if not group.images:
                del self.held[key], self.sizes[key]
        for key in self._keys(ids, epochs):
            if key in self.held:
                self.sizes[key] = sum(len(data or b"") for data in self.held[key].result().images.values())
        return Samples(ids, epochs, images, labels)

    def _load(self, key: Key, rows: np.ndarray) -> _Group:
        images, labels, _ = self._read(key[1], rows)
        return _Group(dict(zip(rows.tolist(), images)), labels)

    def _read(
        self, group: int, rows: np.ndarray | None = None
    ) -> tuple[list[bytes | None], np.ndarray, list[str | None]]:
        """The images of some rows, or of all with their names, and all labels, by one read of one range of bytes."""
        file, place = int(self.index.file[group]), self.index.place(group)
        name, number, state = self.index.files[file], int(self.index.group_in_file[group]), self.index.states[file]
        self._check_unchanged(file)
        footer = self._footer(file)
        data, first, digest = self._fetch(group, footer.row_group(number))
        try:
            found = parse(data, first, size_in(state), footer, number, self.data, names=rows is None)
        except DAMAGED as error:
            raise DataError(f"{place} cannot be read, the file is damaged: {one_line(error)}") from None
        if len(found.labels) != self.index.rows[group]:
            rows_told = f"has {len(found.labels):,} rows, its footer says {self.index.rows[group]:,}"
            raise DataError(f"{place} {rows_told}: the file is damaged")
        if not self.content.see(group, digest):
            remedy = "put the file back, or give this run its own run_dir=..."
            raise DataError(f"{place} has other bytes than when it was read before: {remedy}")
        check_no_null(found.labels, name, number)
        labels = np.array(found.labels.to_pylist())  # to_numpy and pa.array import pandas, in every reader
        check_label_range(labels.min(), labels.max(), self.num_classes, name)
        return found.bytes_of(rows), labels, found.names

    def _fetch(self, group: int, metadata: pq.RowGroupMetaData) -> tuple[bytes, int, bytes]:
        """Bytes of a row group, where they begin in its file, and the hash of the columns that are looked at.

        All its columns are fetched where a `content.json` declares their hash, which is checked.
        """
        file, declared = int(self.index.file[group]), (self.index.declared or {group: ""})[group]
        start, stop = map(int, self.index.spans[group])
        first, last = span_of(metadata) if declared else (start, stop)
        data = self.source.read(self.index.files[file], first, last, self.index.states[file])
        if declared and row_group_hash(data).hex() != declared:
            reason = "the file is damaged, or was replaced"
            raise DataError(f"{self.index.place(group)} is not what content.json beside it says: {reason}")
        return data, first, row_group_hash(memoryview(data)[start - first : stop - first])

    def _footer(self, file: int) -> pq.FileMetaData:
        """What the index was made from: of thousands of processes each reads the footers of its own files."""
        name, state, then = self.index.files[file], self.index.states[file], self.index.footers[file]
        size = size_in(state)
        with self.opening:
            if file not in self.footers:
                raw = self.source.read(name, size - 8 - then.size, size - 8, state)
                if Footer.of(raw) != then:
                    raise DataError(f"{name} has another footer than when the run began: put the file back")
                self.footers[file] = parse_footer(name, raw)
            return self.footers[file]

    def _check_unchanged(self, file: int) -> None:
        """A local file before each read; a remote one, which costs a request, before the first and now and then."""
        name, then = self.index.files[file], self.index.states[file]
        once = file in self.asked and not self.source.local  # asking is only needed again where a read does not tell
        if not once or not self.source.settled(then) and time.monotonic() - self.asked[file] > _ASK_AGAIN:
            now, self.asked[file] = self.source.state(name), time.monotonic()
            if now != then:
                sizes = f"size and version {then} -> {now}"
                raise DataError(f"{name} has changed since the run began ({sizes}): put it back")
