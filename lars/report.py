"""`python -m lars.report RUN... [--picture FILE]`: a table of runs against what their recipes are expected to reach.

The expectation is computed from the committed runs of the same recipe (`recipes/<model>/results/<what>/seed-*`, at
least three): the interval in which one more seed falls with 99 % probability if top-1 is normally distributed over
seeds. Exit status 1 if a run is not finished or outside it.
"""
from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

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


def report(runs: list[Path], picture: Path | None, console: Console) -> bool:
    """Print the table, draw the curves; True if every run with an expectation meets it."""
    table = Table("recipe", "engine", "processes", "top-1 %", "expected", "seconds", "verdict")
    good = True
    for run in runs:
        result = read_result(run)
        name, top1, status = result.get("recipe") or str(run), result.get("top1"), result.get("status", "not started")
        interval = expected_interval([r["top1"] for r in committed_results(name)])
        inside = status == "finished" and (interval is None or interval[0] <= top1 <= interval[1])
        good &= inside
        table.add_row(
            name,
            result.get("engine", ""),
            str(result.get("world_size", "")),
            f"{top1:.2f}" if top1 is not None else "",
            f"{interval[0]:.1f} ... {interval[1]:.1f}" if interval else "",
            f"{result.get('seconds', 0):.0f}",
            f"FAIL ({status})" if status != "finished" else "" if interval is None else "PASS" if inside else "FAIL",
        )
    console.print(table)
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
