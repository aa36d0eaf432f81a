"""The stream at the sizes of the demo and of ImageNet, by calling the pure functions."""
from __future__ import annotations

import numpy as np
import pytest

from lars.data.index import Index
from lars.data.order import Order, samples_hash


def index(samples: int, row_group: int, files: int = 1) -> Index:
    rows = np.full(-(-samples // row_group), row_group)
    rows[-1] -= rows.sum() - samples
    numbers = np.arange(len(rows))
    return Index(tuple(map(str, range(files))), numbers * files // len(rows), numbers, rows, "")


@pytest.mark.parametrize(
    ("samples", "row_group", "batch", "bn_group"),
    [(10_007, 100, 768, 32), (1_000, 100, 1_000, 10), (997, 10, 96, 96), (5_003, 100, 60, None), (50, 100, 16, 4)],
)
def test_every_epoch_is_a_permutation_of_all_samples(samples: int, row_group: int, batch: int, bn_group: int | None) -> None:
    order = Order(index(samples, row_group), 3, batch, bn_group)
    stream = np.concatenate([order.ids(step, range(batch)) for step in range(4 * samples // batch + 1)])
    epochs = [stream[e * samples : (e + 1) * samples] for e in range(4)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(samples))
    assert all(not np.array_equal(epochs[0], e) for e in epochs[1:])
    assert not np.array_equal(epochs[0], np.arange(samples))


def test_slots_do_not_depend_on_how_they_are_cut() -> None:
    order, whole = Order(index(10_007, 100), 0, 768, 32), Order(index(10_007, 100), 0, 768, 32).ids(40, range(768))
    for size in (8, 32, 96, 384):
        parts = [order.ids(40, range(s, s + size)) for s in range(0, 768, size)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_the_seed_changes_the_order() -> None:
    a, b = (Order(index(10_007, 100), seed, 768, 32).ids(0, range(768)) for seed in (0, 1))
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("processes", [1, 8, 256])
def test_at_imagenets_size_a_rank_reads_little_more_than_its_share(processes: int) -> None:
    data = index(1_281_167, 100, 294)
    order = Order(data, 0, 32_768, 128)
    share = 32_768 // processes
    for rank in {0, processes // 2, processes - 1}:
        ids = np.concatenate([order.ids(step, range(rank * share, (rank + 1) * share)) for step in range(39)])
        read = len(np.unique(np.searchsorted(data.first_row, ids, side="right")))
        assert read * 100 <= 1.2 * len(ids)


def test_the_hash_is_the_sum_over_what_the_ranks_consumed() -> None:
    order = Order(index(10_007, 100), 0, 768, 32)
    parts = [range(0, 256), range(256, 768)]
    consumed = sum(samples_hash(step, part, order.ids(step, part)) for step in (5, 6) for part in reversed(parts))
    assert consumed % 2**64 == order.hash(5, 7)
    swapped = order.ids(5, range(768))
    swapped[[0, 1]] = swapped[[1, 0]]
    assert samples_hash(5, range(768), swapped) != samples_hash(5, range(768), order.ids(5, range(768)))


def test_labels_mix_even_where_files_are_sorted_by_class() -> None:
    data = index(50_000, 100, 10)
    order = Order(data, 0, 1_024, 64)
    labels = order.ids(10, range(1_024)) // 500  # 100 classes in order
    # 16 lanes draw from windows of 4 row groups each, 64 of the 500: 47 classes of 100 are to be expected, read in order 3
    assert len(np.unique(labels)) > 40
    assert len(np.unique(np.arange(10 * 1_024, 11 * 1_024) // 500)) == 3
