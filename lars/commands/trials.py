"""Short trials of what a run will lean on all the time: a disk, the network, the files of the data, the loader."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lars.data.index import Index
from lars.data.loader import training_batches
from lars.data.order import Order
from lars.data.reader import Reader
from lars.data.source import BadImages
from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe

_EXCHANGED = 32 * 2**20  # bytes
_READ, _LOADED = 10.0, 3.0  # seconds for one row group of each file, and for passes of the loader


def write_speed(folder: Path, size: int) -> float:
    """Bytes a second of a new file that is really on the disk.

    Raises:
        OSError: the folder does not take it.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\1" * size)
        file.flush()
        os.fsync(file.fileno())
    return size / (time.perf_counter() - started)


def network(device: torch.device) -> tuple[float, float]:
    """Seconds of an all-reduce of one number, and bytes a second on each link while a large tensor is added."""
    processes = dist.get_world_size()

    def exchange(tensor: torch.Tensor) -> float:
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    small, large = torch.zeros(1, device=device), torch.zeros(_EXCHANGED // 4, device=device)
    exchange(small)
    round_trip = statistics.median(exchange(small) for _ in range(20))
    return round_trip, 2 * (processes - 1) / processes * _EXCHANGED / min(exchange(large) for _ in range(3))


def read_row_groups(index: Index, recipe: Recipe, first: int, step: int) -> tuple[int, int]:
    """Read a row group of the files `first`, `first + step`, ...: how many in the time that there is, and of how many.

    Raises:
        DataError, RecipeError: one cannot be read, or is not what a run needs.
    """
    filled = np.flatnonzero(index.rows)
    groups = filled[np.unique(index.file[filled], return_index=True)[1]]  # the first one of each file
    ids = index.first_row[groups][first::step]
    wanted = np.zeros(index.samples, bool)
    wanted[ids] = True
    reader = Reader(index, recipe.data, recipe.model.num_classes, lambda epoch: wanted.copy(), needed=0.0)
    read, end = 0, time.monotonic() + _READ
    try:
        for _ in reader.samples((np.array([one]), np.zeros(1, np.int64)) for one in ids):
            read += 1
            if time.monotonic() > end:
                break
    finally:
        reader.pool.shutdown(cancel_futures=True)
    return read, len(ids)


def loader_speed(index: Index, recipe: Recipe, plan: BatchPlan, passes: range, device: torch.device) -> float:
    """Images a second of this process's loader, the first pass apart.

    Raises:
        DataError, RecipeError: a pass cannot be delivered, or more images are damaged than the recipe allows.
    """
    slots = [range(i * plan.micro_batch, (i + 1) * plan.micro_batch) for i in passes]
    order = Order(index, recipe.seed, plan.global_batch, plan.bn_group)
    batches = training_batches(order, index, recipe, slots, 0, plan.steps, device)
    images, bad, began, took = 0, 0, 0.0, 0.0
    try:
        for batch in batches:
            bad += batch.bad
            if beyond := BadImages.beyond(bad, index.samples, recipe.data.max_bad_fraction):
                raise beyond
            if began:
                images, took = images + len(batch.ids), time.perf_counter() - began
            began = began or time.perf_counter()
            if took > _LOADED:
                break
    finally:
        batches.close()
    return images / took if took else 0.0
