"""The stream over random layouts and at ImageNet's size, by calling the pure functions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lars.data.index import Index
from lars.data.order import Order, samples_hash


def index(rows: list[int] | np.ndarray, files: int = 1) -> Index:
    rows = np.array(rows)
    numbers = np.arange(len(rows))
    return Index(tuple(map(str, range(files))), numbers * files // len(rows), numbers, rows, "")


def even(samples: int, row_group: int, files: int = 1) -> Index:
    rows = np.full(-(-samples // row_group), row_group)
    rows[-1] -= rows.sum() - samples
    return index(rows, files)


def layouts(count: int) -> list[tuple]:
    """(index, seed, global_batch, bn_group): uneven row groups, batches that divide nothing, up to a batch an epoch."""
    made = []
    for number in range(count):
        generator = np.random.default_rng(number)
        rows = generator.integers(1, generator.integers(2, 120), generator.integers(1, 60))
        group = int(generator.choice([1, 2, 3, 4, 7, 8, 16]))
        most = max(1, int(rows.sum()) // group)
        batch = group * int(generator.integers(1, most + 1))
        if batch <= rows.sum():
            made.append(
                (index(rows, int(generator.integers(1, 5))), number, batch, group if generator.random() < 0.8 else None)
            )
    return made


LAYOUTS = layouts(32)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"N{layout[0].samples}-B{layout[2]}-g{layout[3]}")
def test_epochs_are_permutations_however_the_slots_are_cut(layout: tuple) -> None:
    """Any W, any `micro_batch`, any point of resumption: one stream, cut at slots.

    Controls are sorted ids, not our own output.
    """
    data, seed, batch, group = layout
    order = Order(data, seed, batch, group)
    steps = -(-3 * data.samples // batch)
    stream = np.concatenate([order.ids(step, range(batch)) for step in range(steps)])
    for epoch in range(3):
        assert np.array_equal(
            np.sort(stream[epoch * data.samples : (epoch + 1) * data.samples]), np.arange(data.samples)
        )
    epochs = np.concatenate([order.epoch_of(step, range(batch)) for step in range(steps)])
    assert np.array_equal(epochs, np.arange(steps * batch) // data.samples)
    generator = np.random.default_rng(seed)
    parts = [d for d in range(1, batch + 1) if batch % d == 0]
    for _ in range(3):
        size, step = int(generator.choice(parts)), int(generator.integers(steps))
        fresh = Order(data, seed, batch, group)  # a resumed run knows nothing of the steps before
        cut = [fresh.ids(step, range(slot, slot + size)) for slot in generator.permutation(np.arange(0, batch, size))]
        assert np.array_equal(np.sort(np.concatenate(cut)), np.sort(stream[step * batch : (step + 1) * batch]))
        slot = int(generator.integers(batch // size)) * size
        assert np.array_equal(fresh.ids(step, range(slot, slot + size)), stream[step * batch + slot :][:size])


@pytest.mark.parametrize("layout", LAYOUTS[::4], ids=lambda layout: f"N{layout[0].samples}-B{layout[2]}-g{layout[3]}")
def test_a_process_finds_its_samples_in_the_row_groups_that_it_says_it_reads(layout: tuple) -> None:
    data, seed, batch, group = layout
    order = Order(data, seed, batch, group)
    for processes in [p for p in range(1, batch // order.lane + 1) if batch // order.lane % p == 0][:4]:
        share = batch // processes
        for rank in range(processes):
            mine = range(rank * share, (rank + 1) * share)
            for epoch in range(2):
                steps = range(epoch * data.samples // batch, -(-(epoch + 1) * data.samples // batch))
                used = np.concatenate([order.ids(step, mine)[order.epoch_of(step, mine) == epoch] for step in steps])
                assert np.array_equal(np.unique(data.group_of(used)), np.unique(order.row_groups(epoch, mine)))


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    data = even(10_007, 100)
    orders = [Order(data, seed, 768, 32).ids(step, range(768)) for seed, step in ((0, 0), (1, 0), (0, 14))]
    assert not any(np.array_equal(a, b) for n, a in enumerate(orders) for b in orders[:n])
    stream = np.concatenate([Order(data, 0, 768, 32).ids(step, range(768)) for step in range(27)])
    assert not np.array_equal(stream[:10_007], stream[10_007:20_014])


def test_neighbouring_lanes_use_the_row_group_that_they_share_at_the_same_time() -> None:
    """A process that keeps only what it will use soon reads each row group once, though every lane cuts two of them."""
    data = even(40_000, 100)
    order = Order(data, 0, 1_024, 16, window=1)  # an epoch is 39 steps, a window 7
    last_use, opened = {}, {}
    for step in range(39):
        for group in np.unique(data.group_of(order.ids(step, range(1_024)))):
            opened.setdefault(int(group), step)
            last_use[int(group)] = step
    window = order.window / order.lane  # steps that a window lasts
    assert max(last_use[g] - opened[g] for g in opened) <= 2 * math.ceil(window) + 1


@pytest.mark.parametrize(("processes", "bn_group"), [(1, 64), (8, 64), (256, 64), (512, 64), (1024, 16), (2048, 16)])
def test_at_imagenets_size_a_rank_reads_little_more_than_its_share(processes: int, bn_group: int) -> None:
    """294 files, 12,812 row groups: the rank that reads most over a run of 30 epochs.

    Of three ranks the samples are drawn for real.
    """
    data = even(1_281_167, 100, 294)
    order, share = Order(data, 0, 32_768, bn_group), 32_768 // processes
    ranks = range(0, processes, max(1, processes // 64))
    read = np.array(
        [[len(order.row_groups(epoch, range(r * share, (r + 1) * share))) for r in ranks] for epoch in range(30)]
    )
    assert (100 * read.mean(0) / (data.samples / processes)).max() <= 1.2
    for rank in {0, processes // 2, processes - 1}:
        mine = range(rank * share, (rank + 1) * share)
        ids = np.concatenate([order.ids(step, mine) for step in range(39)])
        assert set(data.group_of(ids).tolist()) <= set(order.row_groups(0, mine).tolist())


def test_the_hash_is_the_sum_over_what_the_ranks_consumed() -> None:
    order = Order(even(10_007, 100), 0, 768, 32)
    parts = [range(0, 256), range(256, 768)]
    consumed = sum(samples_hash(step, part, order.ids(step, part)) for step in (5, 6) for part in reversed(parts))
    assert consumed % 2**64 == order.hash(5, 7)
    swapped = order.ids(5, range(768))
    swapped[[0, 1]] = swapped[[1, 0]]
    assert samples_hash(5, range(768), swapped) != samples_hash(5, range(768), order.ids(5, range(768)))


def test_labels_mix_as_the_committed_table_says_and_far_better_than_in_order() -> None:
    table = json.loads((Path(__file__).parents[1] / "benchmarks/order.json").read_text())["shuffling"]
    full, default = (
        next(row for row in table["256/32"] if row["window"].endswith(end)) for end in ("permutation", "(default)")
    )
    assert (
        default["random_batch"] > 0.99 * full["random_batch"] and default["random_group"] > 0.99 * full["random_group"]
    )
    data = even(1_281_167, 100, 294)
    labels = Order(data, 0, 256, 32).ids(10, range(256)) * 1_000 // data.samples  # files sorted by class
    assert abs(len(np.unique(labels)) - default["sorted_batch"]) < 15
    assert len(np.unique(np.arange(2_560, 2_816) * 1_000 // data.samples)) == 2
