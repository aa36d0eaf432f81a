"""`report.html`: a run or a set of runs on one page, for a reader without this software, a network or a wide screen.

`lars.report.report` writes it. Everything stands in the one file, pictures too, and it runs no script. Runs that differ
in nothing but the seed are a group (`lars.report.groups`): the page gives their mean and spread, colours their curves
alike, and sets groups, not runs, against each other.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from lars.recipe.config import one_level
from lars.report import elements
from lars.report.classes import classes
from lars.report.groups import Group, Run, differing, grouped, mean_and_spread, written
from lars.run.folder import write_atomically
from lars.run.mllog import TARGET, seconds_to_target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers tell apart, without black and without yellow (too faint on white).
BLUE, VERMILION, ORANGE = "#0072B2", "#D55E00", "#E69F00"
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", ORANGE, "#56B4E9")
_DASHES = ("-", "--", ":")  # once the colours are used up
_ENVIRONMENT = ("environment", "versions", "reproducibility", "commit")
_HASHES = ("weights_sha256", "samples_hash", "source_sha256", "data_fingerprint")


def curves(groups: list[Group], stacked: bool) -> bytes:
    """A PNG of loss, rate and accuracy over epochs: a colour a group, a line a run. `stacked`: for a narrow screen."""
    top1 = "top-1, per cent of the validation split"
    panels = (("train", "loss", "training loss"), ("train", "lr", "learning rate"), ("evals", "top1", top1))
    labels = [textwrap.fill(group.label, 70) for group in groups]
    columns = 1 if stacked or max(map(len, labels)) > 50 else min(3, len(groups))
    lines_of_text = sum(label.count("\n") + 1 for label in labels) / columns
    figure = elements.figure(6.0 if stacked else 13.0, (8.4 if stacked else 3.4) + 0.2 + 0.2 * lines_of_text)
    rows, columns_of_panels = (3, 1) if stacked else (1, 3)
    axes, handles = figure.subplots(rows, columns_of_panels), {}
    for axis, (kind, key, title) in zip(axes, panels):
        _frame(axis, title)
        for number, (group, label) in enumerate(zip(groups, labels)):
            colour, dash = COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % len(_DASHES)]
            marker = "." if kind == "evals" else ""
            for run in group.runs:
                lines = [x for x in getattr(run, kind) if key in x]
                epochs, values = [x["epoch"] for x in lines], [x[key] for x in lines]
                (handles[label],) = axis.plot(epochs, values, dash, color=colour, marker=marker, linewidth=0.9)
    losses = [[x["loss"] for x in run.train] for group in groups for run in group.runs if run.train]
    if losses and max(map(max, losses)) > 3 * max(loss[0] for loss in losses):
        axes[0].set_yscale("log")  # a run that diverges would press the others flat
    legend = figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold a dollar
    return elements.png(figure)


def trust_curves(runs: dict[str, Run]) -> bytes:
    """A PNG of the trust ratio of every layer over epochs, a panel for each of {title: run}, one above the other.

    The first layer is dark, the last one light.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    shades = ListedColormap(colormaps["viridis"](range(0, 230)))  # its end is too faint on white
    figure = elements.figure(6.0, 3.0 * len(runs) + 0.6)
    axes = figure.subplots(len(runs), 1, sharey=True, squeeze=False)[:, 0]
    for axis, (title, run) in zip(axes, runs.items()):
        _frame(axis, textwrap.fill(title, 60))
        axis.set_yscale("log", nonpositive="mask")
        layers = list(dict.fromkeys(layer for line in run.trust for layer in line["ratios"]))
        for number, layer in enumerate(layers):
            there = [line for line in run.trust if layer in line["ratios"]]
            epochs, ratios = [line["epoch"] for line in there], [line["ratios"][layer] for line in there]
            axis.plot(epochs, ratios, color=shades(number / max(1, len(layers) - 1)), linewidth=0.9)
    place = {"ax": list(axes), "location": "bottom", "fraction": 0.3 / len(runs), "aspect": 40}
    bar = figure.colorbar(ScalarMappable(cmap=shades), ticks=[0, 1], **place)
    bar.ax.set_xticklabels(["first layer", "last layer"])
    return elements.png(figure)


def _frame(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize="medium", parse_math=False)
    axis.set_xlabel("epoch")
    axis.grid(alpha=0.3)


def write_page(runs: list[Path], verdicts: list[dict[str, str]], notes: list[str], picture: Path) -> Path:
    """Write the curves into `picture`, and beside them `report.html`, and `trust.png` where there are trust ratios.

    Args:
        verdicts: a row of the printed table for each run, {column: text}.
        notes: the lines below that table.

    Raises:
        RecipeError: a file of a run is damaged.
    """
    groups = grouped(runs)
    recipes = ", ".join(dict.fromkeys(g.recipe for g in groups))
    by_path = {run.path: run for g in groups for run in g.runs}
    drawn = curves(groups, stacked=False)  # before anything is written: a file of a run may be damaged
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(picture, drawn)
    wide, narrow = elements.data_url(drawn), elements.data_url(curves(groups, stacked=True))
    alt = "training loss, learning rate and top-1 over epochs"
    parts = [
        f"<h1>{escape(recipes)}</h1>",
        _verdicts([by_path[path] for path in runs], verdicts),
        *_unfinished(by_path.values()),
        *(f"<p>{escape(note)}</p>" for note in notes),
        "<h2>Seeds</h2>",
        _seeds(groups),
        "<p>Mean ± standard deviation (n - 1) over the finished seeds, at their ends. "
        "The loss is that of the last step.</p>",
        "<h2>Curves</h2>",
        f'<picture><source media="(min-width: 60rem)" srcset="{wide}"><img src="{narrow}" alt="{alt}"></picture>',
        *(part for run in by_path.values() for part in classes(run)),
        *_differences(groups),
        "<h2>Trust ratios</h2>",
        *_trust(groups, picture.with_name("trust.png")),
        "<h2>Environment</h2>",
        _environment([run for run in by_path.values() if run.result]),
        "<h2>Hashes</h2>",
        elements.table(
            ["run", *_HASHES],
            [[r.name, *(str(r.result.get(h) or "-") for h in _HASHES)] for r in by_path.values()],
            "wrap hashes",
        ),
    ]
    page = picture.with_name("report.html")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"\n<title>{escape(recipes)}</title>\n<style>{elements.STYLE}</style>"
    top = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>'
    write_atomically(page, "\n".join([top, *parts, "</body></html>\n"]).encode("utf-8", "xmlcharrefreplace"))
    return page


def _unfinished(runs: Iterable[Run]) -> list[str]:
    lines = []
    for run in runs:
        if run.status != "finished":
            error = f": {run.result['error']}" if run.result.get("error") else ""
            lines.append(f"{run.name} is not finished ({run.status}, {run.result.get('steps') or 0} steps){error}")
    return [f'<p class="bad">{escape(line)}</p>' for line in lines]


def _verdicts(runs: list[Run], verdicts: list[dict[str, str]]) -> str:
    seconds = [seconds_to_target(run.path) if run.status == "finished" else None for run in runs]
    rows = []
    for run, verdict, s in zip(runs, verdicts, seconds):
        minutes = {f"minutes to {TARGET} %": f"{s / 60:.1f}" if s is not None else ""} if any(seconds) else {}
        *figures, last = verdict.items()
        rows.append({"run": run.name, **dict(figures), **minutes, **dict([last])})
    return elements.table(list(rows[0]), [list(row.values()) for row in rows])


def _seeds(groups: list[Group]) -> str:
    rows = []
    for group in groups:
        seeds, others = group.seeds(), sum(run.status != "finished" for run in group.runs)
        losses = [run.train[-1].get("loss") if run.train else None for run in seeds]
        count = f"{len(seeds)}" + (f" ({others} not finished)" if others else "")
        percent = [_spread([run.result.get(key) for run in seeds], ".2f") for key in ("top1", "top5")]
        rows.append([group.label, count, *percent, _spread(losses, ".4g")])
    return elements.table(["group", "seeds", "top-1 %", "top-5 %", "training loss"], rows)


def _spread(values: list[float | None], digits: str) -> str:
    known = [value for value in values if value is not None]
    return mean_and_spread(known, digits) or "-" if all(map(math.isfinite, known)) else "not finite"


def _differences(groups: list[Group]) -> list[str]:
    """Of several groups the keys in which they differ, of one group all."""
    if len(groups) > 1:
        known, keys = [g for g in groups if g.keys], differing(groups)
        rows = [[key, *(written(g.keys[key]) if key in g.keys else "-" for g in known)] for key in keys]
        table = (
            elements.table(["key", *(g.label for g in known)], rows, "wrap")
            if keys
            else "<p>None in what their config.yaml says.</p>"
        )
        return ["<h2>Differences between the recipes</h2>", table]
    if not groups[0].keys:
        return ["<h2>Recipe</h2>", "<p>Not known: there is no config.yaml.</p>"]
    seeds = ", ".join(dict.fromkeys(written(run.seed) for run in groups[0].runs))
    table = elements.table(
        ["key", "value"], [[key, written(value)] for key, value in {**groups[0].keys, "seed": seeds}.items()], "wrap"
    )
    return ["<h2>Recipe</h2>", f"<details><summary>every key that fixes the run</summary>{table}</details>"]


def _trust(groups: list[Group], picture: Path) -> list[str]:
    shown, parts = {}, []
    for group in groups:
        run = next((run for run in group.runs if run.trust), None)
        if run:
            shown[f"{group.label}, seed\xa0{run.seed}"] = run
        else:  # a LARS run logs them a hundred times, but not one of an older version, or one that has not come so far
            why = "not a LARS run" if group.keys.get("optimizer.name") not in (None, "lars") else "none in its log"
            parts.append(f"<p>{escape(group.label)}: no trust ratios: {why}.</p>")
    if shown:
        write_atomically(picture, png := trust_curves(shown))
        parts[:0] = [
            "<p>The trust ratio of a layer is what LARS multiplies its learning rate by in a step: trust_coefficient · "
            "|w| / (|g| + weight_decay · |w| + eps), from the norms of its weights w and of their gradient g; 1 where "
            "one of them is 0; without weight_decay · |w| where decay_in_norm is false. A line is a layer.</p>",
            f'<img src="{elements.data_url(png)}" alt="trust ratio of every layer over epochs">',
        ]
    return parts


def _environment(runs: list[Run]) -> str:
    """One cell where all runs agree, else a cell for each."""
    found, rows = [], []
    for run in runs:
        told = {key: run.result[key] for key in _ENVIRONMENT if run.result.get(key)}
        found.append({key: written(value) for key, value in one_level(told).items()})
    for key in dict.fromkeys(key for facts in found for key in facts):
        values = [facts.get(key, "-") for facts in found]
        rows.append([key, *(values[:1] if len(set(values)) == 1 else values)])
    names = [run.name for run in runs] if any(len(row) > 2 for row in rows) else ["all runs"]
    return elements.table(["", *names], rows, "wrap") if runs else "<p>No run has begun.</p>"
