"""Reads exactly the slots of this process, decodes them in threads, and stays a few passes ahead.

Decoding releases Python's lock, so threads suffice; there is no child process that a signal could orphan.
"""
from __future__ import annotations

import logging
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import fsspec
import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lars.config import Recipe
from lars.data.augment import draws_of, evaluation_image, training_image
from lars.data.decode import BadImage
from lars.data.index import Index, check_label_range
from lars.data.order import Order

log = logging.getLogger("lars")

_AHEAD = 4  # passes decoded before they are asked for
_OPEN_FILES = 32
_TOGETHER = 16  # samples a thread takes at a time


@dataclass
class Batch:
    """The samples of one pass (or of one chunk of an evaluation) on the CPU."""

    images: Tensor  # uint8 (n, 3, size, size)
    labels: Tensor  # int64 (n,)
    ids: np.ndarray  # int64 (n,): row numbers in the split
    bad: int  # images that could not be decoded and were replaced by a neighbour


class Reader:
    """Random access to samples: reads whole row groups and keeps the last ones, in half the memory free at the start.

    A process needs about WINDOW_ROW_GROUPS row groups for each lane that it plays (`order.py`): ImageNet at batch 32,768
    in lanes of 64 is 512 lanes, 22 GB of row groups of 11 MB over all processes.
    """

    def __init__(self, index: Index, recipe: Recipe, share: float) -> None:
        self.index, self.recipe = index, recipe
        self.limit = psutil.virtual_memory().available // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.epoch = share * index.samples  # samples this process reads in an epoch
        self.first_row = index.first_row
        self.open_files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self.cache: OrderedDict[int, tuple[list[bytes], np.ndarray, int]] = OrderedDict()
        self.cached_bytes = 0
        self.served, self.warned = 0, False
        self.loaded_at: dict[int, int] = {}  # row group: samples served before it was last read

    def group(self, number: int) -> tuple[list[bytes | None], np.ndarray]:
        """The encoded images and the labels of row group `number`."""
        if number in self.cache:
            self.cache.move_to_end(number)
        else:
            images, labels = self._read(number)
            size = sum(len(data or b"") for data in images)
            self.cache[number] = images, labels, size
            self.cached_bytes += size
            while self.cached_bytes > self.limit and len(self.cache) > 1:
                self.cached_bytes -= self.cache.popitem(last=False)[1][2]
            if not self.warned and self.served - self.loaded_at.get(number, self.served - self.epoch) < self.epoch / 2:
                self.warned = True
                log.warning(
                    "row groups are read more than once an epoch: the slots of this process span more than the %.1f GiB "
                    "that row groups may take; more machines or more memory make it faster",
                    self.limit / 2**30,
                )
            self.loaded_at[number] = self.served
        return self.cache[number][:2]

    def _read(self, number: int) -> tuple[list[bytes | None], np.ndarray]:
        data = self.recipe.data
        file = int(self.index.file[number])
        if file not in self.open_files:
            self.open_files[file] = pq.ParquetFile(fsspec.open(self.index.files[file], "rb").open())
            if len(self.open_files) > _OPEN_FILES:
                self.open_files.popitem(last=False)[1].close(force=True)
        table = self.open_files[file].read_row_group(
            int(self.index.group_in_file[number]), columns=[data.image_column, data.label_column]
        )
        images = [image and image["bytes"] for image in table[data.image_column].to_pylist()]
        labels = table[data.label_column].to_numpy()
        check_label_range(labels.min(), labels.max(), self.recipe.model.num_classes, self.index.files[file])
        return images, labels


def _assemble(reader: Reader, pool: ThreadPoolExecutor, ids: np.ndarray, epochs: np.ndarray | None) -> Batch:
    """Read and decode the samples `ids` as they look in `epochs`, or as evaluation sees them."""
    recipe, size = reader.recipe, reader.recipe.model.image_size
    draws = None if epochs is None else draws_of(recipe.seed, epochs, ids)
    groups = np.searchsorted(reader.first_row, ids, side="right") - 1
    rows = ids - reader.first_row[groups]
    reader.served += len(ids)
    held = {int(g): reader.group(int(g)) for g in dict.fromkeys(groups)}
    images, labels = np.empty((len(ids), size, size, 3), np.uint8), np.empty(len(ids), np.int64)

    def place(slot: int) -> int:
        encoded, classes = held[int(groups[slot])]
        for replaced in range(len(encoded)):  # a bad image gives way to the next row of its row group
            row = (int(rows[slot]) + replaced) % len(encoded)
            try:
                if draws is None:
                    view = evaluation_image(encoded[row], recipe.augment, size)
                else:
                    view = training_image(encoded[row], recipe.augment, size, draws[slot])
                images[slot] = view
            except BadImage as error:
                log.warning("sample %d cannot be decoded (%s); the next one stands in for it", ids[slot] + row - rows[slot], error)
                continue
            labels[slot] = classes[row]
            return replaced
        raise RuntimeError(f"no image of row group {int(groups[slot])} can be decoded")

    def place_some(first: int) -> int:
        return sum(place(slot) > 0 for slot in range(first, min(first + _TOGETHER, len(ids))))

    bad = sum(pool.map(place_some, range(0, len(ids), _TOGETHER)))
    return Batch(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels), ids, bad)


def training_batches(order: Order, index: Index, recipe: Recipe, slots: list[range], first_step: int) -> Iterator[Batch]:
    """Endless: the passes `slots` of step `first_step` (from 0), then those of the next step."""

    def wanted() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        step = first_step
        while True:
            for part in slots:
                yield order.ids(step, part), order.epoch_of(step, part)
            step += 1

    share = sum(map(len, slots)) / recipe.global_batch
    return _ahead(wanted(), Reader(index, recipe, share), recipe.data.workers)


def evaluation_batches(index: Index, recipe: Recipe, chunk: int, chunks: range) -> Iterator[Batch]:
    """The validation split in order, cut into chunks of `chunk` samples; this process's share of them."""
    bounds = ((c * chunk, min((c + 1) * chunk, index.samples)) for c in chunks)
    wanted = ((np.arange(low, high), None) for low, high in bounds)
    return _ahead(wanted, Reader(index, recipe, share=1.0), recipe.data.workers)


def _ahead(wanted: Iterable[tuple[np.ndarray, np.ndarray | None]], reader: Reader, workers: int) -> Iterator[Batch]:
    """Assemble batches in a background thread, at most _AHEAD before they are used; errors come out in order."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(_AHEAD)
    stop = threading.Event()

    def produce() -> None:
        try:
            with ThreadPoolExecutor(workers) as pool:
                for ids, epochs in wanted:
                    if not put(_assemble(reader, pool, ids, epochs)):
                        return
            put(None)
        except BaseException as error:  # handed to the thread that waits for the batch
            put(error)

    def put(item: Batch | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
