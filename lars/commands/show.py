"""`lars show RECIPE [key=value ...]`: a picture of what a recipe trains on, to look at before hours are spent.

    lars show recipes/demo/alexnet.yaml

One row a class: what evaluation sees, and then what the first epochs see of the same image, to the pixel (mixup and
cutmix come later, and are not shown). Written to runs/show/<name>.png, or --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from lars.commands.subject import class_names, first_rows, name_of
from lars.data.augment import draws_of, evaluation_image, training_image
from lars.data.decode import BadImage
from lars.data.index import Index, build_indexes
from lars.data.source import DataError
from lars.recipe import config
from lars.recipe.keys import Recipe
from lars.recipe.refusal import RecipeError, refuses
from lars.recipe.schedule import training_size, training_sizes
from lars.report import elements

_ROWS, _EPOCHS = 8, 7


def some_samples(index: Index, recipe: Recipe) -> list[tuple[int, int, bytes]]:
    """(sample id, label, encoded image) of the first row group, the first of each class."""
    table = first_rows(index, recipe.data)
    labels = table["label"].to_pylist()
    first = sorted({label: row for row, label in reversed(list(enumerate(labels)))}.items())[:_ROWS]
    images = table.take([row for _, row in first])["bytes"].to_pylist()
    return [(row, label, image or b"") for (label, row), image in zip(first, images)]


def views(recipe: Recipe, sample: int, data: bytes) -> list[np.ndarray]:
    """uint8 (size, size, 3) each: for evaluation, and in each of the first epochs."""
    size, augment = recipe.model.image_size, recipe.augment
    draws = draws_of(recipe.seed, np.arange(_EPOCHS), np.full(_EPOCHS, sample))
    trained = [training_image(data, augment, training_size(recipe, e), row) for e, row in enumerate(draws)]
    return [evaluation_image(data, augment, size), *trained]


def sheet(rows: list[tuple[str, list[np.ndarray]]], title: str, file: Path) -> None:
    """The views of each sample in a row, under the name of its class."""
    columns = _EPOCHS + 1
    figure = elements.figure(1.35 * columns, 1.4 * len(rows) + 0.6)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for (name, pictures), axes in zip(rows, grid):
        for column, (picture, place) in enumerate(zip(pictures, axes)):
            place.imshow(picture, interpolation="nearest")
            place.set(xticks=[], yticks=[])
            if place in grid[0]:
                place.set_title(f"epoch {column}" if column else "evaluation", fontsize=9)
        axes[0].set_ylabel(name if len(name) < 20 else f"{name[:19]}…", fontsize=9)
    figure.suptitle(title, fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


@refuses(RecipeError, DataError, OSError)
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    recipe = config.load(args.recipe, args.overrides)
    (train,) = build_indexes(recipe.data, recipe.model.num_classes, (recipe.data.train_split,))
    names, out = class_names(recipe.data), args.out or Path("runs/show") / f"{recipe.name}.png"
    found = some_samples(train, recipe)
    rows = []
    for sample, label, data in found:
        try:
            rows.append((name_of(label, names), views(recipe, sample, data)))
        except BadImage as error:
            why = f"training image {sample} of data.path={recipe.data.path} is damaged ({error})"
            raise RecipeError(f"{why}: remove it; in training its neighbour stands in for it") from None
    sizes = ", ".join(f"{size} x {size}" for size in sorted({*training_sizes(recipe), recipe.model.image_size}))
    sheet(rows, f"{recipe.name}, seed {recipe.seed}: {sizes} pixels, as training and evaluation see them", out)
    print(f"{out}: {len(rows)} images of {train.samples:,}, a row each")
    return 0
