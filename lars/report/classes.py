"""What `lars evaluate` found of a run, class by class: the pictures that it draws, and their part of the page."""

from __future__ import annotations

import math
import textwrap
from html import escape
from typing import Any, NamedTuple

import numpy as np

from lars.recipe.refusal import RecipeError, one_line
from lars.report import elements
from lars.report.groups import Run
from lars.run.reading import read_bytes, read_object

MOST_IN_A_PICTURE = 100  # classes
_MOST_UNFOLDED = 20  # rows of a table
_MOST_BYTES = 1 << 23  # of a picture that stands in the page
_COLUMNS = 3  # few, so that a narrow screen shows words that can be read


class Mistake(NamedTuple):
    """An image that was taken for another class, and with what share of the softmax."""

    share: float
    id: int  # row number in the split
    label: str
    prediction: str
    pixels: np.ndarray  # uint8 (size, size, 3)


def confusion_picture(confusion: list[list[int]], names: list[str], title: str) -> bytes:
    """A PNG of the share of each class's images that was taken for each class."""
    counts = np.array(confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = 3.5 + 0.28 * len(shares)
    figure = elements.figure(size + 0.6, size)
    axes = figure.add_subplot()
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    for ticks, rotation in ((axes.set_xticks, 90), (axes.set_yticks, 0)):
        ticks(range(len(shares)), names, rotation=rotation, parse_math=False)
    axes.set(xlabel="prediction", ylabel="label")
    axes.set_title(textwrap.fill(title, round(9 * size)), parse_math=False)
    if len(shares) <= 20:
        for row, column in np.ndindex(shares.shape):
            if shares[row, column] >= 0.005:
                dark = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", color=dark)
    figure.colorbar(image, ax=axes, label="per cent of the label's images", shrink=0.8)
    return elements.png(figure)


def mistakes_picture(mistakes: list[Mistake], title: str) -> bytes:
    """A PNG of images that were taken for another class, each under its label and what it was taken for."""
    rows = math.ceil(len(mistakes) / _COLUMNS)
    figure = elements.figure(2.2 * _COLUMNS, 2.75 * rows + 0.6)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for mistake, axis in zip(mistakes, grid.flat):
        axis.imshow(mistake.pixels, interpolation="nearest")
        words = f"{_short(mistake.label)}\nas {_short(mistake.prediction)}, {100 * mistake.share:.0f} %"
        axis.set_title(words, fontsize=10.5, parse_math=False)
    figure.suptitle(textwrap.fill(title, 60), parse_math=False)
    return elements.png(figure)


def _short(name: str) -> str:
    return name if len(name) < 18 else f"{name[:17]}…"


def classes(run: Run) -> list[str]:
    """The page's part about a run that `lars evaluate` has been asked about; nothing for any other.

    Raises:
        RecipeError: a file in RUN/evaluation is damaged.
    """
    file, again = run.path / "evaluation/evaluation.json", "`lars evaluate` writes it again"
    if file.parent.is_symlink() or not (found := read_object(file, again)):
        return []
    try:
        return _classes(run, found)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RecipeError(f"{file} is damaged ({one_line(error)}): remove it, {again}") from None


def _classes(run: Run, found: dict[str, Any]) -> list[str]:
    model, entries, confusion = str(found["model"]), found["classes"], found.get("confusion")
    rows = sorted(([str(x["class"]), int(x["images"]), float(x["top1"]), x] for x in entries), key=lambda row: row[2])
    taken = [f"{x['taken_for']} ({int(x['times'])})" if "times" in x else "-" for *_, x in rows]
    cells = [[name, f"{images:,}", f"{top1:.2f}", other] for (name, images, top1, _), other in zip(rows, taken)]
    table = elements.table(["class", "images", "top-1 %", "mostly taken for"], cells)
    if len(rows) > _MOST_UNFOLDED:
        table = f"<details><summary>all {len(rows):,} classes, the lowest first</summary>{table}</details>"
    score = (
        f"top-1 {float(found['top1']):.2f} % and top-5 {float(found['top5']):.2f} % of {int(found['images']):,} images"
    )
    told = f"{model}: {score} of {found['split']}, as lars evaluate found them."
    if found["weights_sha256"] != run.result.get("weights_sha256"):
        told += " These are not the weights that the run ended with."
    parts = [f"<h2>Classes of {escape(run.name)}</h2>", f"<p>{escape(told)}</p>", table]
    if confusion is not None:
        counts, names = np.array(confusion, np.int64), [str(x) for x in found["names"]]
        if counts.shape != 2 * (len(names),) or not 0 < len(names) <= MOST_IN_A_PICTURE or counts.min() < 0:
            raise ValueError("its confusion is no square of counts")
        picture = confusion_picture(confusion, names, "what the images of each label are taken for")
        parts.append(f'<img src="{elements.data_url(picture)}" alt="predictions of each class">')
    shown = read_bytes(run.path / "evaluation/mistakes.png", _MOST_BYTES)
    if shown and shown.startswith(b"\x89PNG\r\n\x1a\n"):
        parts.append(
            "<p>The mistakes that it is most certain of, each under its label and under what it is taken as:</p>"
        )
        parts.append(f'<img src="{elements.data_url(shown)}" alt="images that were taken for another class">')
    return parts
