"""The study's figures, as the paper draws them. `summary.py` calls it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import colormaps, pyplot

from lars.run.reading import read_lines

if TYPE_CHECKING:
    from summary import Study

WALL_CLOCK = Path(__file__).parents[2] / "tests/benchmarks/wall_clock.json"
TITLES = {
    "sgd-linear": "SGD, linear scaling",
    "sgd-sqrt": "SGD, square-root scaling",
    "lars": "LARS",
}  # in the tables' order
NETS = {"resnet": "ResNet", "alexnet": "AlexNet"}
_COLOURS = {"sgd-linear": "#d55e00", "sgd-sqrt": "#e69f00", "lars": "#0072b2"}  # told apart by the colour-blind, too


def _style(method: str) -> dict[str, Any]:
    return {"color": _COLOURS[method], "linestyle": ":" if method == "sgd-sqrt" else "-"}


def draw(study: Study, picture: Path) -> None:
    """Accuracy, wall-clock and trust ratios; below them the loss at the smallest batch and at the two largest."""
    figure, (above, below) = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    _accuracy(above[0], study)
    _wall_clock(above[1], study)
    _trust(above[2], study)
    for axis, batch in zip(below, [study.batches[0], *study.batches[-2:]]):
        _loss(axis, study, batch)
    for axis in (*above, *below):
        axis.grid(alpha=0.3)
    figure.suptitle(f"{NETS[study.model]} on CIFAR-10, 8 epochs")
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)


def _against_batch(axis: pyplot.Axes, study: Study) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(study.batches, [f"{b:,}" for b in study.batches])
    axis.set_xlabel("batch")
    axis.legend()


def _accuracy(axis: pyplot.Axes, study: Study) -> None:
    first = study.grid["base_batch"]
    for method, title in TITLES.items():
        # scaling rules meet at the base batch: one SGD there
        tops = {b: study.top1("sgd-linear" if (method, b) == ("sgd-sqrt", first) else method, b) for b in study.batches}
        tops = {b: top1 for b, top1 in tops.items() if top1}
        means, spreads = ([of(top1) for top1 in tops.values()] for of in (statistics.mean, statistics.stdev))
        axis.errorbar(list(tops), means, spreads, capsize=3, marker="o", label=title, **_style(method))
    axis.set_title("top-1 %, test images, mean and spread of the seeds", fontsize=10)
    _against_batch(axis, study)


def _wall_clock(axis: pyplot.Axes, study: Study) -> None:
    rows = [row for row in json.loads(WALL_CLOCK.read_text())["rows"] if row["model"] == study.model]
    for processes, marker in ((1, "o"), (2, "s")):
        there = [row for row in rows if row["processes"] == processes]
        style = {
            "marker": marker,
            "color": "#444444",
            "alpha": 1 / processes,
            "label": f"{processes} process" + ("es" if processes > 1 else ""),
        }
        axis.plot([row["batch"] for row in there], [row["seconds"] for row in there], **style)
    axis.set_ylim(bottom=0)
    axis.set_title("seconds of an epoch on two CPU cores, LARS", fontsize=10)
    _against_batch(axis, study)


def _trust(axis: pyplot.Axes, study: Study) -> None:
    batch = max((b for b in study.batches if study.runs("lars", b)), default=None)
    if batch is None:
        return
    lines = read_lines(study.runs("lars", batch)[0] / "metrics.jsonl", "trust")
    layers = list(lines[0]["ratios"])
    for number, layer in enumerate(layers):
        colour = colormaps["viridis"](number / max(1, len(layers) - 1))
        axis.plot([x["epoch"] for x in lines], [x["ratios"][layer] for x in lines], color=colour, label=layer)
    axis.set_yscale("log")
    axis.legend(fontsize=6, ncols=2)
    axis.set_xlabel("epoch")
    axis.set_title(f"trust ratio of each layer, LARS, batch {batch:,}", fontsize=10)


def _loss(axis: pyplot.Axes, study: Study, batch: int) -> None:
    """A point a step, or the mean of a hundredth of the run where it has more steps than that."""
    for method, title in TITLES.items():
        if method == "sgd-sqrt" and batch == study.grid["base_batch"]:
            continue
        for number, run in enumerate(study.runs(method, batch)):
            lines = read_lines(run / "metrics.jsonl", "train")
            count = max(1, len(lines) // 100)
            parts = [lines[at : at + count] for at in range(0, len(lines), count)]
            epochs, losses = ([statistics.mean(x[key] for x in part) for part in parts] for key in ("epoch", "loss"))
            label = None if number else title
            axis.plot(epochs, losses, label=label, linewidth=1, **_style(method))
    axis.set_xlabel("epoch")
    axis.set_title(f"training loss, batch {batch:,}, a line a seed", fontsize=10)
    if axis.lines:
        axis.legend()
