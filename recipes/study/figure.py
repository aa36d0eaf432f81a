"""The study's figures, as the paper draws them. `summary.py` calls it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import NETS, TITLES, Study

from lars.report.page import BLUE, ORANGE, VERMILION, trust_lines
from lars.run.reading import read_lines

WALL_CLOCK = Path(__file__).parents[2] / "tests/benchmarks/wall_clock.json"
_COLOURS = {"sgd-linear": VERMILION, "sgd-sqrt": ORANGE, "lars": BLUE}


def _style(method: str) -> dict[str, Any]:
    return {"color": _COLOURS[method], "linestyle": ":" if method == "sgd-sqrt" else "-"}


def draw(study: Study, picture: Path) -> None:
    """Accuracy, wall-clock and trust ratios; below them the loss at the smallest batch and at the two largest."""
    figure = Figure((15, 8), layout="constrained")
    above, below = figure.subplots(2, 3)
    _accuracy(above[0], study)
    _wall_clock(above[1], study)
    _trust(above[2], study)
    for axis, batch in zip(below, [study.batches[0], *study.batches[-2:]]):
        _loss(axis, study, batch)
    for axis in (*above, *below):
        axis.grid(alpha=0.3)
    figure.suptitle(f"{NETS[study.model]} on CIFAR-10, 8 epochs")
    figure.savefig(picture, dpi=100)


def _against_batch(axis: Axes, study: Study) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(study.batches, [f"{b:,}" for b in study.batches])
    axis.set_xlabel("batch")
    axis.legend()


def _accuracy(axis: Axes, study: Study) -> None:
    first = study.grid["base_batch"]
    for method, title in TITLES.items():
        batches, means, spreads = [], [], []
        for batch in study.batches:
            # scaling rules meet at the base batch: one SGD there
            played = "sgd-linear" if (method, batch) == ("sgd-sqrt", first) else method
            if top1 := study.top1(played, batch):
                batches.append(batch)
                means.append(statistics.mean(top1))
                spreads.append(statistics.stdev(top1))
        axis.errorbar(batches, means, spreads, capsize=3, marker="o", label=title, **_style(method))
    axis.set_title("top-1 %, test images, mean and spread of the seeds", fontsize=10)
    _against_batch(axis, study)


def _wall_clock(axis: Axes, study: Study) -> None:
    rows = [row for row in json.loads(WALL_CLOCK.read_text())["rows"] if row["model"] == study.model]
    for processes, marker in ((1, "o"), (2, "s")):
        there = [row for row in rows if row["processes"] == processes]
        batches, seconds = [row["batch"] for row in there], [row["seconds"] for row in there]
        label = f"{processes} process" + ("es" if processes > 1 else "")
        axis.plot(batches, seconds, marker=marker, color="#444444", alpha=1 / processes, label=label)
    axis.set_ylim(bottom=0)
    axis.set_title("seconds of an epoch on two CPU cores, LARS", fontsize=10)
    _against_batch(axis, study)


def _trust(axis: Axes, study: Study) -> None:
    batch = max((b for b in study.batches if study.runs("lars", b)), default=None)
    if batch is None:
        return
    lines = read_lines(study.runs("lars", batch)[0] / "metrics.jsonl", "trust")
    trust_lines(axis, lines)
    axis.legend(fontsize=6, ncols=2)
    axis.set_xlabel("epoch")
    axis.set_title(f"trust ratio of each layer, LARS, batch {batch:,}", fontsize=10)


def _loss(axis: Axes, study: Study, batch: int) -> None:
    """A point a step, or the mean of a hundredth of the run where it has more steps than that."""
    for method, title in TITLES.items():
        if method == "sgd-sqrt" and batch == study.grid["base_batch"]:
            continue
        for number, run in enumerate(study.runs(method, batch)):
            lines = read_lines(run / "metrics.jsonl", "train")
            count = max(1, len(lines) // 100)
            epochs, losses = [], []
            for start in range(0, len(lines), count):
                part = lines[start : start + count]
                epochs.append(statistics.mean(line["epoch"] for line in part))
                losses.append(statistics.mean(line["loss"] for line in part))
            label = None if number else title
            axis.plot(epochs, losses, label=label, linewidth=1, **_style(method))
    axis.set_xlabel("epoch")
    axis.set_title(f"training loss, batch {batch:,}, a line a seed", fontsize=10)
    if axis.lines:
        axis.legend()
