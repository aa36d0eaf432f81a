"""`python -m lars.report RUN... [--picture FILE]`: a table of runs against what their recipes are expected to reach.

The expectation is computed from the committed runs of the same recipe (`recipes/<model>/results/<what>/seed-*`, at
least three): the interval in which one more seed falls with 99 % probability if top-1 is normally distributed over
seeds. Without them it is what others published (`recipes/published.yaml`). Exit status 1 if a run is not finished or
does not meet it.
"""
from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table

from lars.run import read_lines, read_result

_T_995 = {3: 9.925, 4: 5.841, 5: 4.604, 6: 4.032, 7: 3.707, 8: 3.499, 9: 3.355, 10: 3.250}  # Student's t, n - 1 degrees


def committed_results(recipe_name: str) -> list[dict]:
    """`result.json` of every committed seed of a recipe named <model>/<what>."""
    model, _, what = recipe_name.partition("/")
    return [read_result(folder) for folder in sorted(Path("recipes", model, "results", what).glob("seed-*"))]


def expected_interval(top1: list[float]) -> tuple[float, float] | None:
    """The 99 % prediction interval for one more seed, or None with fewer than three seeds."""
    if len(top1) < min(_T_995):
        return None
    n = min(len(top1), max(_T_995))
    half = _T_995[n] * statistics.stdev(top1) * (1 + 1 / len(top1)) ** 0.5
    return statistics.mean(top1) - half, statistics.mean(top1) + half


# One run is published, of another implementation. The NUS-HPC table moved by 0.1 to 0.6 points between two of its versions.
TOLERANCE = 0.5
CONTROL_TOLERANCE = 2.0  # less than half of the smallest published loss, 4.5 points (AlexNet at 4,096)


class Expectation(NamedTuple):
    """What a run is judged by. `epoch`: the last one at which an evaluation may be the first with top-1 of `low` or more."""

    text: str
    source: str
    low: float = -math.inf
    high: float = math.inf
    epoch: float | None = None

    def met_by(self, top1: float, evaluations: list[dict[str, Any]]) -> bool:
        """`top1` is that of the end of the run; an evaluation that closes epoch e stands within one step of e."""
        if self.epoch is None:
            return self.low <= top1 <= self.high
        return any(e["top1"] >= self.low and round(e["epoch"]) <= self.epoch for e in evaluations)


def expectation(recipe_name: str) -> Expectation | None:
    """From the committed seeds of a recipe, or from what others published for it."""
    interval = expected_interval([r["top1"] for r in committed_results(recipe_name)])
    if interval:
        return Expectation(f"{interval[0]:.1f} ... {interval[1]:.1f}", "", *interval)
    file = Path("recipes", "published.yaml")
    row = yaml.safe_load(file.read_text()).get(recipe_name) if file.is_file() else None
    if row is None:
        return None
    if "reach" in row:
        latest = math.floor(expected_interval(row["epochs"])[1])
        return Expectation(f"{row['reach']:g} by epoch {latest}", row["source"], row["reach"], epoch=latest)
    if row.get("control"):
        return Expectation(f"{row['top1'] + CONTROL_TOLERANCE:.4g} or less", row["source"], high=row["top1"] + CONTROL_TOLERANCE)
    return Expectation(f"{row['top1'] - TOLERANCE:.4g} or more", row["source"], low=row["top1"] - TOLERANCE)


def report(runs: list[Path], picture: Path | None, console: Console) -> bool:
    """Print the table, draw the curves; True if every run with an expectation meets it."""
    table = Table("recipe", "engine", "processes", "top-1 %", "expected", "seconds", "verdict")
    good, sources = True, {}
    for run in runs:
        result = read_result(run)
        name, top1, status = result.get("recipe") or str(run), result.get("top1"), result.get("status", "not started")
        expected = expectation(name)
        evaluations = read_lines(run / "metrics.jsonl", "eval") if (run / "metrics.jsonl").is_file() else []
        met = status == "finished" and (expected is None or expected.met_by(top1, evaluations))
        good &= met
        if expected and expected.source:
            sources[name] = expected.source
        table.add_row(
            name,
            result.get("engine", ""),
            str(result.get("world_size", "")),
            f"{top1:.2f}" if top1 is not None else "",
            expected.text if expected else "",
            f"{result.get('seconds', 0):.0f}",
            f"FAIL ({status})" if status != "finished" else "" if expected is None else "PASS" if met else "FAIL",
        )
    console.print(table)
    for name, source in sources.items():
        console.print(f"{name}: expected by what {source} published (recipes/published.yaml)", soft_wrap=True, highlight=False)
    if picture:
        draw([run for run in runs if (run / "metrics.jsonl").is_file()], picture)
        console.print(f"curves: {picture}", soft_wrap=True)
    return good


def draw(runs: list[Path], picture: Path) -> None:
    """Loss, rate and accuracy over epochs, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for run in runs:
        label = read_result(run).get("recipe") or run.name
        train, evals = read_lines(run / "metrics.jsonl", "train"), read_lines(run / "metrics.jsonl", "eval")
        axes[0].plot([x["epoch"] for x in train], [x["loss"] for x in train], label=label)
        axes[1].plot([x["epoch"] for x in train], [x["lr"] for x in train], label=label)
        axes[2].plot([x["epoch"] for x in evals], [x["top1"] for x in evals], marker=".", label=label)
    for axis, title in zip(axes, ("training loss", "learning rate", "top-1, per cent of the validation split")):
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    if runs:
        axes[2].legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--picture", type=Path, help="where to draw the curves (default: beside the runs)")
    args = parser.parse_args()
    shared = Path(os.path.commonpath(args.runs))
    picture = args.picture or (shared / "plots" if len(args.runs) == 1 else shared) / "curves.png"
    console = Console(width=None if sys.stdout.isatty() else 120)
    return 0 if report(args.runs, picture, console) else 1


if __name__ == "__main__":
    sys.exit(main())
