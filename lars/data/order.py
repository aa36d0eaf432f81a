"""Which sample stands in which slot: the endless stream, as a pure function.

The stream is the concatenation of epochs; each epoch is a permutation of all samples; step t (from 0) is made of its
positions [t B, (t + 1) B), and slot s is position t B + s. Nothing here knows a process, a worker or a pass.

A process plays the same slots in every step, and should read few row groups. So slots form lanes of `bn_group`, and an
epoch's samples are dealt lane by lane: the row groups are put in a random order, end to end; each lane takes a
consecutive part of that line, as long as it has slots in the epoch; the part is shuffled inside windows of several row
groups. Odd lanes go through their part backwards, so neighbours use the row group that they share at the same time.

The window is WINDOW_ROW_GROUPS, and more where lanes are few, so that together they hold OPEN_ROW_GROUPS: with fewer,
files sorted by class give batches of few classes (`tests/benchmarks/order.py` compares it with a full permutation).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from lars.data.index import Index
from lars.exact.keyed import Purpose, mix64, permutation

WINDOW_ROW_GROUPS = 4  # of each lane, at least
OPEN_ROW_GROUPS = 256  # of all lanes together, at least


class Order:
    """The ids of any stretch of the stream, for the work of that stretch and one permutation of row groups an epoch."""

    def __init__(
        self, index: Index, seed: int, global_batch: int, bn_group: int | None, window: float | None = None
    ) -> None:
        """`window`: how many row groups are shuffled together; by default it follows from the number of lanes."""
        self.rows, self.first_row, self.samples = index.rows, index.first_row, index.samples
        self.seed, self.batch = seed, global_batch
        self.lane = bn_group or math.gcd(global_batch, 32)
        self.window_groups = window or max(WINDOW_ROW_GROUPS, OPEN_ROW_GROUPS * self.lane / global_batch)
        self.window = max(1.0, self.window_groups * self.samples / len(self.rows))
        self._line = lru_cache(2)(self._line)
        self._shuffled = lru_cache(4 * global_batch // self.lane)(self._shuffled)

    def ids(self, step: int, slots: range) -> np.ndarray:
        """Sample ids (int64) of consecutive slots of step `step`, counted from 0."""
        position, end = step * self.batch + slots.start, step * self.batch + slots.stop
        pieces = []
        while position < end:
            epoch, slot = position // self.samples, position % self.batch
            lane_end = position + self.lane - slot % self.lane
            stop = min(end, lane_end, (epoch + 1) * self.samples)
            pieces.append(self._lane_piece(epoch, slot // self.lane, position, stop - position))
            position = stop
        return np.concatenate(pieces)

    def epoch_of(self, step: int, slots: range) -> np.ndarray:
        """The epoch (from 0) of each of these slots."""
        return (step * self.batch + np.arange(slots.start, slots.stop)) // self.samples

    def hash(self, first: int, last: int) -> int:
        """What the samples of steps `first` ... `last - 1` add to `samples_hash` by the pure order."""
        slots = range(self.batch)
        return sum(samples_hash(step, slots, self.ids(step, slots)) for step in range(first, last)) % 2**64

    def row_groups(self, epoch: int, slots: range) -> np.ndarray:
        """The row groups of these slots' samples (whole lanes) in one epoch: what a process that plays them reads."""
        start, end = self._begin(epoch, slots.start // self.lane), self._begin(epoch, -(-slots.stop // self.lane))
        groups, begins, turn = self._line(epoch)
        begin = (start + turn) % self.samples
        stop = begin + end - start  # beyond the end of the line it goes on at its beginning
        first, last = np.searchsorted(begins, [begin, (stop - 1) % self.samples], side="right") - 1
        return (
            groups[first : last + 1]
            if stop <= self.samples
            else np.unique(np.concatenate([groups[first:], groups[: last + 1]]))
        )

    def _lane_piece(self, epoch: int, lane: int, position: int, count: int) -> np.ndarray:
        start, length = self._begin(epoch, lane), self._begin(epoch, lane + 1) - self._begin(epoch, lane)
        low = self._in_lane(lane, position) - self._in_lane(lane, epoch * self.samples)
        if lane % 2:
            return self._stretch(epoch, start, length, length - low - count, length - low)[::-1]
        return self._stretch(epoch, start, length, low, low + count)

    def _stretch(self, epoch: int, start: int, length: int, low: int, high: int) -> np.ndarray:
        """The samples at [low, high) of a lane's part, which has `length` places from `start` on, in windows."""
        windows = max(1, round(length / self.window))
        pieces = []
        while low < high:
            window = ((low + 1) * windows - 1) // length  # window w holds places [w length // windows, ...)
            begin, end = window * length // windows, (window + 1) * length // windows
            shuffled = self._shuffled(epoch, start + begin, end - begin)
            pieces.append(shuffled[low - begin : min(high, end) - begin])
            low = end
        return np.concatenate(pieces)

    def _begin(self, epoch: int, lane: int) -> int:
        """Where a lane's part begins on the line of an epoch."""
        return self._dealt_before(lane, (epoch + 1) * self.samples) - self._dealt_before(lane, epoch * self.samples)

    def _in_lane(self, lane: int, position: int) -> int:
        """How many positions before `position` have their slot in this lane."""
        rest = min(max(position % self.batch - lane * self.lane, 0), self.lane)
        return position // self.batch * self.lane + rest

    def _dealt_before(self, lane: int, position: int) -> int:
        """How many positions before `position` have their slot in an earlier lane."""
        return position // self.batch * lane * self.lane + min(position % self.batch, lane * self.lane)

    def _line(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The epoch's order of row groups, where each begins in the line, and by how much the line, a ring, is turned.

        Without the turn a lane would cut row groups of equal size at the same row in every epoch.
        """
        groups = permutation(len(self.rows), self.seed, Purpose.ROW_GROUPS, epoch)
        return (
            groups,
            np.concatenate([[0], np.cumsum(self.rows[groups])]),
            int(mix64(self.seed, Purpose.TURN, epoch) % np.uint64(self.samples)),
        )

    def _shuffled(self, epoch: int, start: int, count: int) -> np.ndarray:
        """The ids at [start, start + count) of the epoch's line, shuffled."""
        groups, begins, turn = self._line(epoch)
        places = (np.arange(start, start + count) + turn) % self.samples
        which = np.searchsorted(begins, places, side="right") - 1
        ids = self.first_row[groups[which]] + places - begins[which]
        return ids[permutation(count, self.seed, Purpose.WINDOW, epoch, start)]


def samples_hash(step: int, slots: range, ids: np.ndarray) -> int:
    """Sum of mix64(step + 1, slot, id) mod 2^64: commutes, so ranks add theirs in any order.

    `step` counts from 0 as everywhere in this file; files for people number steps from 1.
    """
    return int(mix64(step + 1, np.arange(slots.start, slots.stop), ids).sum(dtype=np.uint64))


class Audit:
    """Compares what the processes have consumed with what the pure order says, from one check to the next."""

    def __init__(self, order: Order, step: int, found: int) -> None:
        """`found` is the `samples_hash` of a run after `step`, which was checked when it was saved."""
        self.order, self.step, self.hash = order, step, found

    def check(self, step: int, found: int) -> None:
        """After `step`, before anything is saved or evaluated.

        Raises:
            RuntimeError: other samples were consumed.
        """
        expected = (self.hash + self.order.hash(self.step, step)) % 2**64
        if found != expected:
            raise RuntimeError(
                f"the samples consumed up to step {step} are not those of the order: {found:016x}, not {expected:016x}"
            )
        self.step, self.hash = step, found
