"""`python -m tests.benchmarks.resize [--json]`: how far our pixels are from those of the recipes' sources.

Views of 224 pixels of the photographs in scikit-image and scikit-learn (extra `bench`), as JPEGs of quality 92: random
boxes of our own crop, the same for every source, and the cut of evaluation. Differences are in levels of 0 ... 255, by
how many old pixels a side become a new one; a root mean square is over all pixels of the views. It writes the tables of
docs/resize.md.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

from lars.data.augment import _random_box, draws_of, evaluation_image, training_image
from lars.data.decode import Encoded
from lars.data.resample import resampled
from lars.exact.portable import cpu
from lars.recipe import config
from tests.benchmarks import photos
from tests.benchmarks.loader import installed
from tests.benchmarks.resizers import SIZE, SOURCES, Box, whole

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/resize.md"
MARKS = "<!-- resize: written by `python -m tests.benchmarks.resize` -->\n", "<!-- end of resize -->\n"
MODULES = ("PIL", "cv2", "torchvision", "nvidia.dali", "tensorflow")
VIEWS = 40  # of each photograph
FACTORS = {"enlarged": 1.0, "1 to 1.5": 1.5, "1.5 to 2": 2.0, "above 2": np.inf}
CONTROL = next(iter(SOURCES))


def beside(data: bytes, box: Box) -> dict[str, np.ndarray]:
    """{what else changes the pixels of the control's view: its pixels}."""
    left, top, right, bottom = box
    width, height = whole(data).size
    left, right = (left - 1, right - 1) if left else (left + 1, right + 1) if right < width else (left, right - 1)
    again = io.BytesIO()
    whole(data).save(again, "JPEG", quality=85)
    view, rows, columns = SOURCES[CONTROL].view, slice(box[1], box[3]), slice(box[0], box[2])
    decoded = {
        "chroma repeated, as our quick decoding": Encoded(data).pixels(fast=True),
        "the quicker cosine transform, TensorFlow's decoding": simplejpeg.decode_jpeg(data, "RGB", fastdct=True),
    }
    return {
        **{name: resampled(pixels[rows, columns], (SIZE, SIZE), "bilinear") for name, pixels in decoded.items()},
        "stored once more, with JPEG quality 85": view(again.getvalue(), box),
        "the box moved by one old pixel": view(data, (left, top, right, bottom)),
    }


def measure() -> dict[str, Any]:
    augment = replace(config.load(ROOT / "recipes/resnet50/lars-b32k-90ep.yaml", []).augment, flip=0.0)
    here = {name: one for name, one in SOURCES.items() if installed(one.needs)}
    apart: dict[str, dict[str, list[tuple[float, float]]]] = {}  # {what: {factor: (mean, mean square) of each view}}
    taken: dict[str, list[float]] = {}

    def note(what: str, factor: str, one: np.ndarray, other: np.ndarray) -> None:
        off = one.astype(np.float64) - other
        apart.setdefault(what, {}).setdefault(factor, []).append((np.abs(off).mean(), (off**2).mean()))

    pictures = photos.photographs()
    for number, picture in enumerate(pictures):
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=92)
        data = stream.getvalue()
        for row in draws_of(0, np.arange(VIEWS), np.full(VIEWS, number)):
            box = _random_box(picture.size, augment, iter(row.tolist()))
            sides = (box[2] - box[0]) * (box[3] - box[1])
            factor = next(name for name, most in FACTORS.items() if sides**0.5 / SIZE <= most)
            ours: dict[str | None, np.ndarray] = {}
            for way in ("mixed", "bilinear", "area", "tf1_bilinear"):
                started = time.thread_time()
                ours[way] = training_image(data, replace(augment, resampling=way), SIZE, row)
                taken.setdefault(way, []).append(time.thread_time() - started)
            theirs = {name: one.view(data, box) for name, one in here.items()}
            for name, one in here.items():
                note(name, factor, ours["mixed"], theirs[name])
                if one.key:
                    note(f"{name} with its key", factor, ours[one.key], theirs[name])
            for name, pixels in {**theirs, **beside(data, box)}.items():
                note(f"control: {name}", factor, theirs[CONTROL], pixels)
        for name, one in here.items():
            cut = one.view(data, None)
            for way in {"mixed", one.key} - {None}:
                kept = evaluation_image(data, replace(augment, resampling=way), SIZE)
                note(name if way == "mixed" else f"{name} with its key", "evaluation", kept, cut)

    def told(views: list[tuple[float, float]]) -> dict[str, float]:
        mean, square = np.mean(views, axis=0)
        return {"mean": round(float(mean), 2), "rms": round(float(square**0.5), 2)}

    found = {}
    for what, factors in apart.items():
        drawn = [view for factor, views in factors.items() if factor != "evaluation" for view in views]
        found[what] = {factor: told(views) for factor, views in factors.items()} | {"training": told(drawn)}
    counts = {factor: len(apart[CONTROL][factor]) for factor in (*FACTORS, "evaluation")}
    return {
        "cpu": cpu()[0],
        "versions": {name: import_module(name).__version__ for name in MODULES if installed(name)},
        "photographs": len(pictures),
        "views": counts,
        "levels": found,
        "cpu_ms_a_view": {way: round(1000 * float(np.median(seconds)), 2) for way, seconds in taken.items()},
    }


def tables(found: dict[str, Any]) -> str:
    """What stands between the marks of docs/resize.md."""
    levels, keyed, own = found["levels"], " with its key", "control: "

    def cell(what: str, column: str) -> str:
        value = levels.get(what, {}).get(column)
        return f"{value['mean']:.2f} ({value['rms']:.2f})" if value else ""

    head = ["source", *FACTORS, "all", "with its key", "evaluation", "with its key"]
    lines = [head, ["---"] * len(head)]
    for name, one in SOURCES.items():
        cells = [cell(name, factor) for factor in (*FACTORS, "training")] if name in levels else ["not installed"]
        cells += [cell(name + keyed, "training"), cell(name, "evaluation"), cell(name + keyed, "evaluation")]
        lines.append([name + (f": `{one.key}`" if one.key else ""), *cells])
    lines += [[], ["beside torchvision's views", *FACTORS, "all"], ["---"] * (len(FACTORS) + 2)]
    for what in (what for what in levels if what.startswith(own) and levels[what]["training"]["mean"]):
        lines.append([what.removeprefix(own), *(cell(what, factor) for factor in (*FACTORS, "training"))])
    views = ", ".join(f"{factor}: {count}" for factor, count in found["views"].items())
    said = f"{found['photographs']} photographs; views by factor: {views}."
    spent = ", ".join(f"{way} {ms:g}" for way, ms in found["cpu_ms_a_view"].items())
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    told = "\n".join(f"| {' | '.join(line)} |" if line else "" for line in lines)
    return f"{told}\n\n{said} CPU milliseconds a view ({found['cpu']}): {spent}. {versions}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cv2.setNumThreads(0)
    result = measure()
    before, after = PAGE.read_text().split(MARKS[0])[0], PAGE.read_text().split(MARKS[1])[1]
    PAGE.write_text(before + MARKS[0] + tables(result) + MARKS[1] + after)
    print(json.dumps(result, indent=1) if args.json else tables(result))


if __name__ == "__main__":
    main()
