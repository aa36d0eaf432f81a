"""`lars report RUN... [--picture FILE]`: a table of runs against what their recipes are expected to reach.

It also draws their curves, and writes `report.html` beside the picture (`lars.report.page`): one file to hand on, with
verdicts, spread over seeds, curves, differences of the recipes, trust ratios, environment and hashes.

The expectation is computed from the committed runs of the same recipe (`recipes/<model>/results/<what>/seed-*`, at
least three): the interval in which one more seed falls with 99 % probability if top-1 is normally distributed over
seeds. Without them it is what others published (`recipes/published.yaml`). Exit status 1 if a run is not finished or
does not meet it, 2 if a file of a run is damaged or a folder is none of a run.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lars.recipe import config
from lars.recipe.keys import differing, fixing
from lars.recipe.refusal import RecipeError, printable, refuses
from lars.report.page import write_page
from lars.run.progress import stdout
from lars.run.reading import RECIPES, flatten_run, is_name, read_lines, read_result

_T_995 = {3: 9.925, 4: 5.841, 5: 4.604, 6: 4.032, 7: 3.707, 8: 3.499, 9: 3.355, 10: 3.250}  # Student's t, n - 1 degrees


def committed_results(recipe_name: str) -> list[dict]:
    """`result.json` of every committed seed of a recipe named <model>/<what>; none of what cannot be such a name."""
    if not is_name(recipe_name):
        return []
    model, _, what = recipe_name.partition("/")
    return [read_result(folder) for folder in sorted((RECIPES / model / "results" / what).glob("seed-*"))]


def committed_top1(recipe_name: str) -> list[float]:
    """Top-1 of every committed seed that came to its end."""
    finished = [result for result in committed_results(recipe_name) if result.get("status") == "finished"]
    return [result["top1"] for result in finished if result.get("top1") is not None]


def expected_interval(top1: list[float]) -> tuple[float, float] | None:
    """The 99 % prediction interval for one more seed, or None with fewer than three seeds."""
    if len(top1) < min(_T_995):
        return None
    n = min(len(top1), max(_T_995))
    half = _T_995[n] * statistics.stdev(top1) * (1 + 1 / len(top1)) ** 0.5
    return statistics.mean(top1) - half, statistics.mean(top1) + half


# One run is published, of another implementation; NUS-HPC's table moved by 0.1 to 0.6 points between two versions.
BELOW = 0.5
# A control must not reach what the recipe beside it does: less than half of the smallest published loss, 4.5 points
# (AlexNet at 4,096). So much more than is published was not reached by the same recipe on the same images.
ABOVE = 2.0


class Expectation(NamedTuple):
    """What a run is judged by. `epoch`: the last one at which an evaluation may be the first with top-1 >= `low`."""

    text: str
    source: str
    low: float = -math.inf
    high: float = math.inf
    epoch: float | None = None

    def met_by(self, top1: float, evaluations: list[dict[str, Any]]) -> bool:
        """`top1` is that of the end of the run; an evaluation that closes epoch e stands within one step of e."""
        if self.epoch is None:
            return self.low <= top1 <= self.high
        reached = any(e["top1"] >= self.low and e["epoch"] < self.epoch + 0.5 for e in evaluations)
        return reached and top1 <= self.high


def expectation(recipe_name: str) -> Expectation | None:
    """From the committed seeds of a recipe, or from what others published for it."""
    interval = expected_interval(committed_top1(recipe_name))
    if interval:
        return Expectation(f"{interval[0]:.1f} ... {interval[1]:.1f}", "", *interval)
    file = RECIPES / "published.yaml"
    row = yaml.safe_load(file.read_text()).get(recipe_name) if file.is_file() else None
    if row is None:
        return None
    published = row.get("reach", row.get("top1"))
    low, high = published - BELOW, published + ABOVE
    if "reach" in row:
        latest = math.floor(expected_interval(row["epochs"])[1])
        text = f"{published:g} by epoch {latest}, {high:.4g} or less"
        return Expectation(text, row["source"], published, high, epoch=latest)
    if row.get("control"):
        return Expectation(f"{high:.4g} or less", row["source"], high=high)
    return Expectation(f"{low:.4g} ... {high:.4g}", row["source"], low, high)


def changed_keys(run: Path, recipe_file: Path) -> list[str]:
    """The keys of the trajectory that a run gives another value than its recipe; the seed may be any."""
    ran, here = fixing(flatten_run(run)), config.trajectory(config.load(recipe_file, []))
    free = {"seed"}
    if None in (ran.get("model.weights_sha256"), here.get("model.weights_sha256")):  # their file is not here
        free.add("model.weights_sha256")
    return [key for key in differing(ran, here) if key not in free]


def ended_early(run: Path) -> str | None:
    """How a run that says that it is finished stopped before the end of its recipe; None if it did not."""
    ran, result = flatten_run(run), read_result(run)
    at, wanted, steps, stop = result.get("epochs"), ran.get("epochs"), result.get("steps"), ran.get("max_steps")
    if result.get("status") != "finished" or at is None or not steps or type(wanted) not in (int, float):
        return None
    if wanted - at <= 1 / steps * at + 1e-4:  # the last epoch may end within a step, and four digits are written
        return None
    return f"ended after {at:g} of {wanted:g} epochs" + (f" (max_steps={stop})" if type(stop) is int else "")


def changes(run: Path, recipe_name: str) -> list[str]:
    """What a run changes of this repository's recipe of its name, or leaves out; none where there is no such recipe."""
    recipe_file = RECIPES / f"{recipe_name}.yaml"
    if not is_name(recipe_name) or not recipe_file.is_file() or not (ran := flatten_run(run)):
        return []
    early = [why] if (why := ended_early(run)) else []
    return [*(f"{key}={str(ran.get(key))[:40]}" for key in changed_keys(run, recipe_file)), *early]


class Verdict(NamedTuple):
    """A run's row of the table, {column: text}. `source`: who published the expectation, if not our own seeds."""

    row: dict[str, str]
    good: bool
    source: str
    changes: list[str]  # of its recipe


def judge(run: Path) -> Verdict:
    """Compare a run with what is expected of its recipe: good if it is finished and meets that, or nothing is expected.

    Nothing is expected of a run that changes a key of its recipe or stopped before its end.

    Raises:
        RecipeError: a file of the run is damaged, or two of them contradict each other.
    """
    result = read_result(run)
    name, top1, status = result.get("recipe") or str(run), result.get("top1"), result.get("status") or "not started"
    changed = changes(run, name)
    expected = None if changed else expectation(name)
    evaluations = read_lines(run / "metrics.jsonl", "eval")
    if status == "finished" and top1 is not None and evaluations and evaluations[-1]["top1"] != top1:
        last = evaluations[-1]["top1"]
        raise RecipeError(f"{run}: result.json says top-1 {top1}, the last evaluation in metrics.jsonl {last}")
    met = status == "finished" and top1 is not None and (expected is None or expected.met_by(top1, evaluations))
    verdict = "PASS" if met else "FAIL"
    if status != "finished":
        verdict = f"FAIL ({status})"
    elif expected is None:
        verdict = ""
    row = {
        "recipe": name,
        "engine": result.get("engine") or "",
        "processes": str(result.get("world_size") or ""),
        "top-1 %": f"{top1:.2f}" if top1 is not None else "",
        "expected": expected.text if expected else "",
        "seconds": f"{result.get('seconds') or 0:.0f}",
        "verdict": verdict,
    }
    return Verdict(row, met, expected.source if expected else "", changed)


def report(runs: list[Path], picture: Path | None, console: Console) -> bool:
    """Print the table, draw the curves, write the page beside them; True if every run with an expectation meets it.

    Raises:
        RecipeError: a file of a run is damaged.
    """
    verdicts = [judge(run) for run in runs]
    table = Table(*verdicts[0].row)
    for verdict in verdicts:
        table.add_row(*(escape(text) for text in verdict.row.values()))
    console.print(table)
    published = {v.row["recipe"]: v.source for v in verdicts if v.source}
    notes = [
        f"{name}: expected by what {source} published (recipes/published.yaml)" for name, source in published.items()
    ]
    for run, verdict in zip(runs, verdicts):
        if verdict.changes:
            notes.append(printable(f"{run} is no run of its recipe, and is not judged: {', '.join(verdict.changes)}"))
        elif not flatten_run(run):
            notes.append(f"{run} has no config.yaml: what it changes of its recipe cannot be told")
    if not RECIPES.is_dir():
        notes.append(f"nothing is expected of these runs, since there is no {RECIPES}: use the library of a clone")
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    if picture:
        page = write_page(runs, [v.row for v in verdicts], notes, picture)
        console.print(f"curves: {picture}", soft_wrap=True, markup=False)
        console.print(f"page: {page}", soft_wrap=True, markup=False)
    return all(verdict.good for verdict in verdicts)


@refuses(RecipeError, OSError)
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--picture", type=Path, help="where to draw the curves, a .png (default: beside the runs)")
    args = parser.parse_args()
    if args.picture and args.picture.suffix != ".png":
        raise RecipeError(f"--picture {args.picture} must end in .png")
    for run in args.runs:
        if not any((run / name).exists() for name in ("result.json", "config.yaml", "metrics.jsonl", "lock")):
            raise RecipeError(f"{run} is no run folder: give as in runs/demo/alexnet/seed-0")
    mixed = len({run.is_absolute() for run in args.runs}) > 1
    shared = Path(os.path.commonpath([run.absolute() if mixed else run for run in args.runs]))
    picture = args.picture or (shared / "plots" if len(args.runs) == 1 else shared) / "curves.png"
    if picture.parent.is_symlink() and not args.picture:
        raise RecipeError(f"{picture.parent} is a link: give a place for the curves with --picture")
    return 0 if report(args.runs, picture, stdout()) else 1
