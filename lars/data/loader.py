"""Delivers the passes of one process as pixels, a few ahead of their use; `processes.py` is how it is done."""

from __future__ import annotations

import logging
import os
import pickle
import select
import signal
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import Tensor

from lars.data.forked import fork
from lars.data.index import Index
from lars.data.order import Order
from lars.data.processes import ARENA, DONE, END, FREE, NEWS, Decoding, Pipes, Serving, Shared, end
from lars.data.reader import Pass, Reader
from lars.data.source import DataError
from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe
from lars.recipe.launched import cores_here, decoders
from lars.recipe.refusal import RecipeError
from lars.recipe.schedule import training_size, training_sizes

log = logging.getLogger("lars")

_TOGETHER = 16  # samples that a decoder takes at a time, at most


@dataclass
class Batch:
    """The samples of one pass (or of one chunk of an evaluation)."""

    images: Tensor  # uint8 (n, 3, size, size): shared memory (pinned for a GPU), good until the next batch is asked for
    labels: Tensor  # int64 (n,)
    ids: np.ndarray  # int64 (n,): row numbers in the split
    bad: int  # images that could not be decoded and were replaced by a neighbour
    data_error: Exception | None = None  # why these are zeros instead of samples


def workers_of(recipe: Recipe) -> int:
    """Decoding processes of this rank: what the recipe says, or else what the cores allow."""
    return recipe.data.workers or decoders(cores_here(), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def data_line(recipe: Recipe, index: Index, plan: BatchPlan) -> str:
    """What a process reads in an epoch, and its memory and processes; a warning if files are sorted by class."""
    order = Order(index, recipe.seed, plan.global_batch, plan.bn_group)
    mine = range(plan.passes_per_process * plan.micro_batch)
    groups = order.row_groups(0, mine)
    share = index.rows[groups].sum() * plan.processes / index.samples
    if index.classes_per_group and 4 * index.classes_per_group < min(
        recipe.model.num_classes, index.samples / len(index.rows)
    ):
        log.warning(
            "the row groups hold %.1f classes each on average: the files are sorted by class, and a batch-norm group "
            "sees only the classes of %.0f row groups; `lars convert` writes image folders as shuffled files",
            index.classes_per_group,
            order.window_groups,
        )
    return (
        f"data: {len(index.files):,} files of {len(index.rows):,} row groups; a process reads {len(groups):,} of them "
        f"an epoch ({share:.2f} x its share), holds up to {_needed(order, index, mine) / 2**20:,.0f} MiB of them and "
        f"has {workers_of(recipe)} to decode"
    )


def _needed(order: Order, index: Index, slots: range) -> float:
    """Bytes of the row groups that these slots use at the same time."""
    windows = -(-len(slots) // order.lane) * order.window_groups
    return min(windows, len(order.row_groups(0, slots))) * float(np.mean(index.memory))


def training_batches(
    order: Order,
    index: Index,
    recipe: Recipe,
    slots: list[range],
    first_step: int,
    last_step: int,
    device: torch.device | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Loader:
    """The passes `slots` (consecutive) of the steps `first_step` ... `last_step - 1`, counted from 0.

    `stop` is asked while there is nothing to deliver.
    """
    mine = range(slots[0].start, slots[-1].stop)

    def passes() -> Iterator[Pass]:
        for step in range(first_step, last_step):
            for part in slots:
                yield order.ids(step, part), order.epoch_of(step, part)

    def size_of(number: int) -> int:
        return training_size(recipe, (first_step + number // len(slots)) * order.batch / index.samples)

    def remaining(epoch: int) -> np.ndarray:
        wanted = np.zeros(index.samples, bool)
        steps = range(epoch * index.samples // order.batch, -(-(epoch + 1) * index.samples // order.batch))
        for step in range(max(first_step, steps.start), min(last_step, steps.stop)):
            wanted[order.ids(step, mine)[order.epoch_of(step, mine) == epoch]] = True
        return wanted

    reader = Reader(index, recipe.data, recipe.model.num_classes, remaining, _needed(order, index, mine))
    largest = max(map(len, slots)), max(training_sizes(recipe))
    batches = Loader(reader, passes(), *largest, recipe, training=True, device=device, size_of=size_of)
    batches.stop = stop
    return batches


def evaluation_batches(
    index: Index, recipe: Recipe, chunk: int, chunks: range, device: torch.device | None = None
) -> Loader:
    """The split in order, cut into chunks of `chunk` samples; this process's share of them."""
    bounds = [(c * chunk, min((c + 1) * chunk, index.samples)) for c in chunks]

    def remaining(epoch: int) -> np.ndarray:
        wanted = np.zeros(index.samples, bool)
        wanted[chunks.start * chunk : chunks.stop * chunk] = True
        return wanted

    passes = ((np.arange(low, high), np.zeros(high - low, np.int64)) for low, high in bounds)
    reader = Reader(index, recipe.data, recipe.model.num_classes, remaining, needed=0.0)
    return Loader(reader, passes, chunk, recipe.model.image_size, recipe, training=False, device=device)


class Loader:
    """An iterator of `Batch`, a few passes ahead of its use; `close` ends its processes.

    `stop`, if it is set, is asked while there is nothing to deliver.

    Raises, when a batch is asked for that there is not:
        DataError: its samples cannot be read, or a process of the loader died.
        RecipeError: a label is out of range.
        InterruptedError: `stop` said so.
    """

    def __init__(
        self,
        reader: Reader,
        passes: Iterable[Pass],
        most: int,
        size: int,
        recipe: Recipe,
        training: bool,
        device: torch.device | None = None,
        size_of: Callable[[int], int] | None = None,
    ) -> None:
        """Make the memory and the processes.

        Args:
            most: samples of the largest pass.
            size: pixels of a side of the largest images.
            size_of: the side of the images of a pass, by its number from 0; `size` for all of them if there is none.
        """
        workers = workers_of(recipe)
        together = min(_TOGETHER, max(4, most // (2 * workers)))
        slots = max(3, -(-2 * workers * together // most) + 2)
        self.stop: Callable[[], bool] = lambda: False
        self.waited = 0.0  # seconds in which the training process had to wait for a batch
        # Too many seconds without any news: more than a read is tried again for, and fewer than the watchdog waits.
        self.silent, self.patience = 0, (recipe.data.retry_seconds + recipe.runtime.hang_seconds) / 2
        self.cuda = device is not None and device.type == "cuda"
        self.size_of = size_of or (lambda number: size)
        self.shared = Shared(slots, most, size, max(ARENA, 4 * workers * 2**20))
        self.pipes = Pipes()
        self.next, self.passes = 0, None  # the pass to deliver next; how many there are, once known
        self.decoded: Counter[int] = Counter()  # samples of each pass
        self.lent: deque[torch.cuda.Event | None] = deque()  # for each pass that still has its slot, oldest first
        self.failure: tuple[int, Exception] | None = None
        serve = Serving(reader, passes, self.shared, self.pipes, together)
        decode = Decoding(recipe, training, self.size_of, self.shared, self.pipes)
        self.children = {fork(serve.run): "reading"}
        self.children |= {fork(decode.run): "decoding" for _ in range(workers)}
        self.close = weakref.finalize(self, end, self.children, self.pipes, self.shared)
        self.pipes.keep(self.pipes.news[0], self.pipes.free[1])
        if self.cuda:
            self.shared.pin()

    def take(self, samples: int) -> Batch:
        """The next batch, or zeros and the reason: so a process whose data fail plays its step to the end like the
        others, where all of them learn of it. One that left would leave them waiting."""
        try:
            return next(self)
        except (DataError, RecipeError, InterruptedError) as error:
            size = self.size_of(self.next)
            images = torch.zeros(samples, 3, size, size, dtype=torch.uint8)
            return Batch(images, torch.zeros(samples, dtype=torch.int64), np.zeros(samples, np.int64), 0, error)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if not self.close.alive:
            raise StopIteration
        started = time.perf_counter()
        self._take_back()
        while self.passes is None or self.next < self.passes:
            slot = self.next % self.shared.slots
            if self.decoded[self.next] and self.decoded[self.next] == self.shared.counts[slot, 0]:
                break
            if self.failure and self.next >= self.failure[0]:
                raise self.failure[1]
            self._listen()
        else:
            self.close()
            raise StopIteration
        del self.decoded[self.next]
        pixels = self.shared.pixels(self.next, self.size_of(self.next))
        self.next += 1
        self.waited += time.perf_counter() - started
        samples, bad = map(int, self.shared.counts[slot])
        self.lent.append(None)
        return Batch(
            torch.from_numpy(pixels[:samples]).permute(0, 3, 1, 2),
            torch.from_numpy(self.shared.labels[slot, :samples].copy()),
            self.shared.ids[slot, :samples].copy(),
            bad,
        )

    def _take_back(self) -> None:
        """Give slots back to the reader: on a GPU once the copies that were queued before the last batch are made."""
        if self.cuda and self.lent:
            event = torch.cuda.Event()
            event.record()
            self.lent[-1] = event
        while len(self.lent) > (1 if self.cuda else 0):
            if event := self.lent.popleft():
                event.synchronize()
            os.write(self.pipes.free[1], FREE)

    def _listen(self) -> None:
        """Take the next message, or notice after a second that none comes."""
        poll = select.poll()
        poll.register(self.pipes.news[0], select.POLLIN)
        if not poll.poll(1000):
            if self.stop():
                raise InterruptedError("stopped while waiting for data")
            self.silent += 1  # counted, not measured: a machine that was suspended is not late
            self._check_children()
            return
        self.silent = 0
        what, *facts = NEWS.unpack(os.read(self.pipes.news[0], NEWS.size))
        if what == DONE:
            number, samples = facts
            self.decoded[number] += samples
        elif what == END:
            self.passes = facts[0]
        else:
            number, length = facts
            self.failure = number, pickle.loads(self.shared.error[:length])  # written by our own child

    def _check_children(self) -> None:
        for child, role in list(self.children.items()):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                del self.children[child]  # its number may be another process's from now on
                code = os.waitstatus_to_exitcode(status)
                how = (
                    f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}, see above"
                )
                told = f"a {role} process of the loader {how}; if memory ran out, lower data.workers"
                self.failure = self.next, DataError(told)
                return
        if self.silent > self.patience:
            states = {child: psutil.Process(child).status() for child in self.children}
            # who only waits for work sleeps; where all do, the reader waits for the data
            standing = [child for child, state in states.items() if state != psutil.STATUS_SLEEPING] or list(
                self.children
            )[:1]
            named = ", ".join(f"{self.children[child]} process {child} ({states[child]})" for child in standing)
            told = f"the loader has delivered nothing for {self.silent} s: {named} stands still"
            self.failure = self.next, DataError(told)
