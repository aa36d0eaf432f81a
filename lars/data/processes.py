"""The processes of a loader: one reads, several decode, and all share one piece of memory with the one that trains.

    files -> reader (row groups, each once) -> encoded samples -> decoders -> pixels of a pass -> the training process

The memory is mapped, without a name, before the processes are forked, and they talk over pipes, in messages of a fixed
size that one read takes whole. Nothing has a name and no lock is held by anyone, so a process that is killed
leaves nothing behind and nobody waiting: the others see that their parent is gone, and the parent sees that a child is.
"""

from __future__ import annotations

import logging
import os
import pickle
import select
import signal
import struct
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch

from lars.data.augment import draws_of, evaluation_image, training_image
from lars.data.decode import MAX_BYTES, BadImage
from lars.data.forked import shared_array
from lars.data.malloc import return_freed
from lars.data.reader import Pass, Reader, Samples
from lars.data.source import DataError, DecoderError
from lars.recipe.keys import Recipe
from lars.recipe.refusal import RecipeError, one_line

log = logging.getLogger("lars")

ARENA = 2 * MAX_BYTES + 2**20  # bytes of encoded samples on their way to a decoder; more with many of them
_ERROR = 64 * 1024  # bytes
_TASK = struct.Struct("<qqq")  # reader to decoders: place in the arena, samples, pass
# Decoders to reader: place in the arena; -1: done, n: sample n is no image, -2 - n: it failed.
_BACK = struct.Struct("<qq")
_WORDS = 256  # bytes of a sample in the arena, at least: there a decoder says what is wrong with it
NEWS = struct.Struct("<qqq")  # to the training process: what, then as below
DONE, END, FAILED = range(3)  # DONE: pass, samples. END: number of passes, 0. FAILED: pass, length of the error
FREE = b"\0"  # training process to reader: the oldest pass has left its slot


class Shared:
    """Memory of all processes of a loader: the pixels of a few passes (`slots`), and encoded samples on their way.

    Passes are handed out and taken in their order, so pass n is in slot n % slots.
    """

    def __init__(self, slots: int, samples: int, size: int, arena: int) -> None:
        """Of `slots` passes of `samples` images at most, each at most `size` pixels high and wide."""
        self.images = shared_array(np.uint8, slots, samples * size * size * 3)
        self.labels, self.ids = shared_array(np.int64, 2, slots, samples)
        self.counts = shared_array(np.int64, slots, 2)  # of each slot's pass: samples, bad images
        self.error = memoryview(shared_array(np.uint8, _ERROR))  # the reader's last words
        self.arena = memoryview(shared_array(np.uint8, arena))
        self.slots, self.pinned = slots, False

    def pixels(self, number: int, size: int) -> np.ndarray:
        """uint8 (n, size, size, 3): a pass's memory as images of that size, n at least what it was made for."""
        image, slot = size * size * 3, number % self.slots
        return self.images[slot, : self.images.shape[1] // image * image].reshape(-1, size, size, 3)

    def pin(self) -> None:
        """Let a GPU read the pixels directly, so that its copies run beside its work."""
        # The enum itself is always true.
        error = int(torch.cuda.cudart().cudaHostRegister(self.images.ctypes.data, self.images.nbytes, 0))
        self.pinned = not error
        if error:
            log.warning(
                "%d MiB of memory could not be pinned (CUDA error %d): copies to the GPU are slower",
                self.images.nbytes >> 20,
                error,
            )

    def unpin(self) -> None:
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.images.ctypes.data)
            self.pinned = False


class Pipes:
    """(read end, write end) of each; children inherit all of them."""

    def __init__(self) -> None:
        self.tasks, self.back, self.news, self.free = (os.pipe() for _ in range(4))

    def keep(self, *ends: int) -> None:
        """Close all the others."""
        for end in {*self.tasks, *self.back, *self.news, *self.free} - set(ends):
            os.close(end)
        self.open = ends


def end(children: dict[int, str], pipes: Pipes, shared: Shared) -> None:
    """Of a loader: its processes, the pipes, the pinning."""
    for child in children:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)  # they own nothing that could be lost
            os.waitpid(child, 0)
    for end in pipes.open:
        os.close(end)
    shared.unpin()


@dataclass
class _Sample:
    """One sample on its way to a decoder."""

    place: int  # in its pass
    id: int
    epoch: int
    data: bytes | None
    at: int = 0  # in the arena
    tries: int = 0  # neighbours that were tried in its stead


@dataclass
class _Task:
    begin: int  # in the arena
    end: int
    number: int  # of the pass
    samples: list[_Sample]
    done: bool = False


class Serving:
    """The reader process: gives each pass a slot, its samples to the decoders, and finds neighbours for bad images."""

    def __init__(self, reader: Reader, passes: Iterable[Pass], shared: Shared, pipes: Pipes, together: int) -> None:
        self.reader, self.passes, self.shared, self.pipes, self.together = reader, passes, shared, pipes, together
        self.number = 0  # the pass that is handed out next, or that cannot be
        self.free = shared.slots
        self.tasks: deque[_Task] = deque()  # in the order of their places in the arena, which is a ring

    def run(self) -> None:
        return_freed()
        self.poll = select.poll()
        for end in (self.pipes.back[0], self.pipes.free[0]):
            self.poll.register(end, select.POLLIN)
        work, length = self._serve, 0
        while True:
            try:
                work()
            except (DataError, RecipeError) as error:
                if not length:  # the training process may be reading these words when another pass fails too
                    words = pickle.dumps(error)
                    length = len(words)
                    self.shared.error[:length] = words
                self._tell(FAILED, self.number, length)
            work = self._listen  # what was handed out before is still delivered

    def _serve(self) -> None:
        for samples in self.reader.samples(self.passes):
            while not self.free:
                self._listen()
            self.free -= 1
            self._hand_out(self.number, samples)
            self.number += 1
        self._tell(END, self.number)
        while True:
            self._listen()

    def _hand_out(self, number: int, samples: Samples) -> None:
        count, slot = len(samples.ids), number % self.shared.slots
        self.shared.labels[slot, :count], self.shared.ids[slot, :count] = samples.labels, samples.ids
        self.shared.counts[slot] = count, 0
        several, size, each = [], 0, zip(samples.ids.tolist(), samples.epochs.tolist(), samples.images)
        for place, (sample_id, epoch, data) in enumerate(each):
            several.append(_Sample(place, sample_id, epoch, data))
            size += len(data or b"")
            if len(several) == self.together or size > MAX_BYTES // 4 or place == count - 1:
                self._send(number, several)
                several, size = [], 0

    def _send(self, number: int, samples: list[_Sample]) -> None:
        # One byte too many is enough for the decoder to refuse it.
        data = [(s.data or b"")[: MAX_BYTES + 1] for s in samples]
        table = np.array([(s.place, s.epoch, s.id, len(d)) for s, d in zip(samples, data)], np.int64).tobytes()
        size = len(table) + sum(max(_WORDS, len(d)) for d in data)
        while (begin := self._room(size)) is None:
            self._listen()
        self.shared.arena[begin : (at := begin + len(table))] = table
        for sample, part in zip(samples, data):
            self.shared.arena[at : at + len(part)], sample.at = part, at
            at += max(_WORDS, len(part))
        # Tables of integers begin at multiples of 8.
        self.tasks.append(_Task(begin, -(-at // 8) * 8, number, samples))
        self._hear()  # so that decoders never wait for us while we wait for them
        os.write(self.pipes.tasks[1], _TASK.pack(begin, len(samples), number))

    def _room(self, size: int) -> int | None:
        """Where in the ring `size` bytes are free, behind the newest task."""
        while self.tasks and self.tasks[0].done:
            self.tasks.popleft()
        if not self.tasks:
            return 0
        oldest, newest = self.tasks[0].begin, self.tasks[-1].end
        if self.tasks[-1].begin >= oldest:
            return newest if newest + size <= len(self.shared.arena) else 0 if size < oldest else None
        return newest if newest + size < oldest else None

    def _listen(self) -> None:
        """Wait for a message, take all there are."""
        self.poll.poll()
        self._hear()

    def _hear(self) -> None:
        while ready := self.poll.poll(0):  # asked anew each time: what one message sets off may take the next
            end = ready[0][0]
            if end == self.pipes.free[0]:
                self.free += len(os.read(end, len(FREE)))
            else:
                begin, what = _BACK.unpack(os.read(end, _BACK.size))
                task = next(t for t in self.tasks if t.begin == begin and not t.done)
                if what == -1:
                    task.done = True
                else:
                    self._look_after(task, task.samples[what if what >= 0 else -2 - what], bad=what >= 0)

    def _look_after(self, task: _Task, sample: _Sample, bad: bool) -> None:
        """The next row of the same row group stands in for an image that is bad; any other failure ends the run."""
        index, reader = self.reader.index, self.reader
        words = bytes(self.shared.arena[sample.at : sample.at + _WORDS]).split(b"\0")[0].decode(errors="replace")
        group = int(index.group_of(np.array([sample.id]))[0])
        first, rows, tries = int(index.first_row[group]), int(index.rows[group]), sample.tries + 1
        row = (sample.id - first + sample.tries) % rows
        try:
            if not bad:
                raise DecoderError(f"{words} (sample {first + row}: {reader.where(group, row)})")
            log.warning(
                "sample %d cannot be decoded (%s; %s); the next one of its row group stands in for it",
                first + row,
                words,
                reader.where(group, row),
            )
            if tries == rows:
                raise DataError(f"no image of {index.place(group)} can be decoded")
            data, label = reader.neighbour(group, (row + 1) % rows)
            slot = task.number % self.shared.slots
            self.shared.labels[slot, sample.place] = label
            self.shared.counts[slot, 1] += tries == 1
            self._send(task.number, [replace(sample, data=data, tries=tries)])
        except (DataError, RecipeError):
            self.number = min(self.number, task.number)  # this pass is the first that cannot be delivered
            raise

    def _tell(self, what: int, number: int, length: int = 0) -> None:
        os.write(self.pipes.news[1], NEWS.pack(what, number, length))


class Decoding:
    """A decoder process: encoded samples from the arena to pixels in a slot."""

    def __init__(self, recipe: Recipe, training: bool, size_of: Callable, shared: Shared, pipes: Pipes) -> None:
        self.recipe, self.training, self.size_of, self.shared, self.pipes = recipe, training, size_of, shared, pipes

    def run(self) -> None:
        cv2.setNumThreads(0)
        while task := os.read(self.pipes.tasks[0], _TASK.size):
            begin, count, number = _TASK.unpack(task)
            good = self._decode(begin, count, number)
            os.write(self.pipes.back[1], _BACK.pack(begin, -1))
            if good:
                os.write(self.pipes.news[1], NEWS.pack(DONE, number, good))

    def _decode(self, begin: int, count: int, pass_number: int) -> int:
        """Returns how many of the samples became pixels; the reader is told of the others."""
        recipe, size, good = self.recipe, self.size_of(pass_number), 0
        pixels = self.shared.pixels(pass_number, size)
        table = np.frombuffer(self.shared.arena, np.int64, 4 * count, begin).reshape(count, 4)
        draws = draws_of(recipe.seed, table[:, 1], table[:, 2]) if self.training else None
        at = begin + table.nbytes
        for number, (place, _, _, length) in enumerate(table.tolist()):
            data = self.shared.arena[at : at + length]
            try:
                if draws is None:
                    view = evaluation_image(data, recipe.augment, size)
                else:
                    view = training_image(data, recipe.augment, size, draws[number])
                pixels[place] = view
                good += 1
            except Exception as error:
                plain, bad = isinstance(error, (BadImage, RecipeError)), isinstance(error, BadImage)
                words = one_line(error) if plain or not str(error) else f"{type(error).__name__}: {one_line(error)}"
                words += "; lower data.workers, or free memory" if isinstance(error, MemoryError) else ""
                self.shared.arena[at : at + _WORDS] = words.encode()[:_WORDS].ljust(_WORDS, b"\0")
                os.write(self.pipes.back[1], _BACK.pack(begin, number if bad else -2 - number))
            at += max(_WORDS, length)
        return good
