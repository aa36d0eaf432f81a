"""The study's three figures. `summary.py` calls it."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import design
from design import FIXED, METHODS, RESULTS, TARGET, Setting
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lars.report.page import COLOURS
from lars.run.reading import diverged, read_lines

TITLES = {"sgd": "SGD", "nesterov": "Nesterov", "lars": "LARS", "lamb": "LAMB"}
_COLOUR = dict(zip(("lars", "sgd", "nesterov", "lamb"), COLOURS))


def draw(folder: Path) -> None:
    """accuracy.png, target.png and stability.png, each as soon as a point of it was run."""
    if any(design.tested(method, batch) for method in METHODS for batch in FIXED["rates"]):
        figure = Figure((6.4, 4), layout="constrained")
        _accuracy(figure.subplots())
        figure.savefig(folder / "accuracy.png", dpi=110)
    if any(design.steps_to_target(method, batch) for method in METHODS for batch in TARGET["rates"]):
        figure = Figure((6.4, 4), layout="constrained")
        _target(figure.subplots())
        figure.savefig(folder / "target.png", dpi=110)
    if (folder / "tuning").is_dir():
        figure = Figure((12, 4), layout="constrained")
        for axis, batch in zip(figure.subplots(1, 3, sharey=True), sorted(FIXED["rates"])):
            _stability(axis, batch)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
        figure.savefig(folder / "stability.png", dpi=110)


def _against_batch(axis: Axes, batches: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axis.set_xlabel("batch")
    axis.grid(alpha=0.3)
    axis.legend()


def _accuracy(axis: Axes) -> None:
    batches = sorted(FIXED["rates"])
    for method in METHODS:
        there = {batch: top1 for batch in batches if (top1 := design.tested(method, batch))}
        means, spreads = map(statistics.mean, there.values()), map(statistics.stdev, there.values())
        style = {"color": _COLOUR[method], "marker": "o", "capsize": 3, "label": TITLES[method]}
        axis.errorbar(list(there), list(means), list(spreads), **style)
    axis.set_title(f"top-1 % after {FIXED['epochs']} epochs, test images, mean and spread of the seeds", fontsize=10)
    _against_batch(axis, batches)


def _target(axis: Axes) -> None:
    """Steps fall as 1 / batch while scaling is perfect; the grey line does so from SGD's first point on.

    A point is the median seed, its bar goes from the fewest steps to the most; what never gets there is not drawn.
    """
    batches = list(TARGET["rates"])
    for method in METHODS:
        found = {batch: design.steps_to_target(method, batch) for batch in batches}
        there = {batch: steps for batch, steps in found.items() if steps and math.isfinite(statistics.median(steps))}
        medians = [statistics.median(steps) for steps in there.values()]
        below = [median - min(steps) for median, steps in zip(medians, there.values())]
        above = [max(filter(math.isfinite, steps)) - median for median, steps in zip(medians, there.values())]
        style = {"color": _COLOUR[method], "marker": "o", "capsize": 3, "label": TITLES[method]}
        axis.errorbar(list(there), medians, [below, above], **style)
        if method == "sgd" and batches[0] in there:
            perfect = [medians[0] * batches[0] / batch for batch in batches]
            axis.plot(batches, perfect, color="grey", linestyle=":", label="perfect scaling")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_title(f"steps until {TARGET['top1']:g} % of the held-back images are right, constant rate", fontsize=10)
    _against_batch(axis, batches)


def final_loss(label: str) -> float:
    """Mean training loss of a tuning run's last tenth; that of guessing if it diverged, nan if it was not run."""
    if not (found := design.result("tuning", label, FIXED["tuning_seed"])) or diverged(found):
        return math.nan if not found else math.log(10)
    run = RESULTS / "tuning" / label / f"seed-{FIXED['tuning_seed']}"
    losses = [line["loss"] for line in read_lines(run / "metrics.jsonl", "train")]
    return min(math.log(10), statistics.mean(losses[-max(1, len(losses) // 10) :]))


def final_losses(method: str, batch: int) -> dict[Setting, float]:
    """Of every setting that is tried, nan where it was not run."""
    return {setting: final_loss(setting.label) for setting in design.settings(FIXED, method, batch)}


def better(losses: dict[Setting, float]) -> dict[Setting, float]:
    """At each rate the one of its two settings that ended with the lower loss; none where one of them was not run."""
    found: dict[int, list[Setting]] = {}
    for setting in losses:
        found.setdefault(setting.k, []).append(setting)
    whole = [both for both in found.values() if not any(math.isnan(losses[each]) for each in both)]
    return {(best := min(both, key=losses.get)): losses[best] for both in whole}


def _stability(axis: Axes, batch: int) -> None:
    """All settings as points, a line through the better ones: it turns upwards where the method becomes unstable."""
    for method in METHODS:
        losses = final_losses(method, batch)
        points = [(setting.k, loss) for setting, loss in losses.items()]
        axis.scatter(*zip(*points), s=8, color=_COLOUR[method], alpha=0.5)
        best = {setting.k: loss for setting, loss in better(losses).items()}
        axis.plot(list(best), list(best.values()), marker="o", color=_COLOUR[method], label=TITLES[method])
    axis.set_title(f"final training loss, batch {batch:,}", fontsize=10)
    first, last = FIXED["rates"][batch]
    axis.set_xticks(range(first, last + 1))
    axis.set_xlim(first - 0.3, last + 0.3)
    axis.set_xlabel("k: the effective rate is base × 2^k")
    axis.grid(alpha=0.3)
