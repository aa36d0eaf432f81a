"""`python -m tests.benchmarks.order [--json]`: what the sample order costs to read and how well it shuffles.

At ImageNet's size, but nothing is read: 294 files, 12,812 row groups, 1,281,167 rows, and the pure functions of
`lars/data/order.py`.

Reading, for each number of processes: row groups that the process with most of them opens in an epoch, in ratio to its
share of the rows; worst epoch of 90 and mean over them. Shuffling, for each window: distinct classes of a batch,
distinct classes of a batch-norm group, distance of neighbouring slots in ratio to a full permutation, and how often two
samples that shared a batch-norm group share one in the next epoch. Once with labels at random places, once sorted by
class.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np

from lars.data.index import Index
from lars.data.order import Order

SAMPLES, ROW_GROUPS, FILES, CLASSES, GROUP_MB = 1_281_167, 12_812, 294, 1_000, 11.0
PROCESSES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
EPOCHS = 90
SHUFFLES = ((256, 32), (4_096, 64), (32_768, 64), (32_768, 16))  # global_batch, bn_group
WINDOWS = (1, 2, 4, 8, 16, None, float("inf"))  # row groups; None is the default, inf a full permutation


def imagenet() -> Index:
    """The layout of ILSVRC/imagenet-1k: 294 files of row groups of 100 rows."""
    rows = np.full(ROW_GROUPS, 100)
    rows[-1] = SAMPLES - rows[:-1].sum()
    numbers = np.arange(ROW_GROUPS)
    return Index(tuple(map(str, range(FILES))), numbers * FILES // ROW_GROUPS, numbers, rows, "")


def reading(global_batch: int, bn_group: int) -> list[dict]:
    """One row for each number of processes that the batch admits."""
    order, index = Order(imagenet(), 0, global_batch, bn_group), imagenet()
    rows = []
    for processes in (w for w in PROCESSES if w <= global_batch // bn_group):
        share = global_batch // processes
        opened = np.zeros((EPOCHS, processes))
        for epoch in range(EPOCHS):
            for rank in range(processes):
                groups = order.row_groups(epoch, range(rank * share, (rank + 1) * share))
                opened[epoch, rank] = index.rows[groups].sum()
        ratio = opened / (SAMPLES / processes)
        lanes = global_batch // bn_group // processes
        held = lanes * order.window_groups * GROUP_MB / 1024
        row = {"processes": processes, "row_groups": round(float(opened.mean()) / 100, 1), "held_gib": round(held, 2)}
        rows.append(
            {
                **row,
                "worst_epoch": round(float(ratio.max()), 3),
                "worst_rank": round(float(ratio.mean(0).max()), 3),
                "mean": round(float(ratio.mean()), 3),
            }
        )
    return rows


def shuffling(global_batch: int, bn_group: int, window: float | None) -> dict:
    """How well one window shuffles, over the first batches of epochs 0 and 1."""
    index = imagenet()
    order = Order(index, 0, global_batch, bn_group, window if window != float("inf") else None)
    if window == float("inf"):
        generator = np.random.default_rng(0)
        stream = [generator.permutation(SAMPLES) for _ in range(2)]
    else:
        stream = None
    count = min(SAMPLES // global_batch, max(8, 65_536 // global_batch))
    labels = {
        "random": np.random.default_rng(1).integers(0, CLASSES, SAMPLES),
        "sorted": np.arange(SAMPLES) * CLASSES // SAMPLES,
    }

    def batch(epoch: int, number: int) -> np.ndarray:
        if stream is not None:
            return stream[epoch][number * global_batch : (number + 1) * global_batch]
        first = -(-epoch * SAMPLES // global_batch)
        return order.ids(first + number, range(global_batch))

    batches = [batch(0, number) for number in range(count)]
    found: dict = {
        "window": "full permutation"
        if stream is not None
        else f"{order.window_groups:g}" + (" (default)" if window is None else "")
    }
    for name, of in labels.items():
        found[f"{name}_batch"] = round(float(np.mean([len(np.unique(of[b])) for b in batches])), 1)
        found[f"{name}_group"] = round(
            float(np.mean([len(np.unique(of[g])) for b in batches for g in b.reshape(-1, bn_group)])), 1
        )
    apart = np.mean([np.abs(np.diff(b.reshape(-1, bn_group), axis=1)).mean() for b in batches])
    found["distance"] = round(float(apart) / (SAMPLES / 3), 3)
    place = np.full(SAMPLES, -1)  # batch-norm group of each sample in epoch 1, as far as looked at
    steps = SAMPLES // global_batch - 1
    for number in range(steps):
        place[batch(1, number)] = np.repeat(np.arange(global_batch // bn_group), bn_group) + number * (
            global_batch // bn_group
        )
    groups = place[np.concatenate(batches)].reshape(-1, bn_group)
    same = np.mean([((g[:, None] == g[None, :]) & (g[:, None] >= 0)).sum() - (g >= 0).sum() for g in groups[:1024]])
    found["again"] = float(f"{same / (bn_group * (bn_group - 1)):.1e}")
    return found


def reading_table(tables: dict[str, list[dict]]) -> str:
    """Both batch-norm groups side by side, as lars/data/README.md shows it."""
    names = list(tables)
    lines = [
        "| processes | "
        + " | ".join(
            f"`bn_group` {n.split('/')[1]}: held GiB | read, mean | worst process of a run | worst epoch" for n in names
        )
        + " |"
    ]
    lines.append("|" + " --- |" * (1 + 4 * len(names)))
    for processes in PROCESSES:
        rows = [next((row for row in tables[name] if row["processes"] == processes), None) for name in names]
        cells = [
            f"{r['held_gib']:.2f} | {r['mean']:.2f} | {r['worst_rank']:.2f} | {r['worst_epoch']:.2f}"
            if r
            else " | | | "
            for r in rows
        ]
        lines.append(f"| {processes:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shuffling_table(tables: dict[str, list[dict]]) -> str:
    """Of each batch, classes of a batch and of a batch-norm group."""
    lines = [
        "| batch / `bn_group` | window | classes a batch | a group "
        "| sorted files: a batch | a group | distance | again |",
        "|" + " --- |" * 8,
    ]
    for name, rows in tables.items():
        for row in rows:
            figures = [
                row[key]
                for key in ("random_batch", "random_group", "sorted_batch", "sorted_group", "distance", "again")
            ]
            lines.append(f"| {name} | {row['window']} | " + " | ".join(f"{f:g}" for f in figures) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = {
        "reading": {f"{batch}/{group}": reading(batch, group) for batch, group in ((32_768, 64), (32_768, 16))},
        "shuffling": {
            f"{batch}/{group}": [shuffling(batch, group, window) for window in WINDOWS] for batch, group in SHUFFLES
        },
    }
    if args.json:
        json.dump(result, sys.stdout, indent=1)
        return
    print(reading_table(result["reading"]), shuffling_table(result["shuffling"]), sep="\n")


if __name__ == "__main__":
    main()
