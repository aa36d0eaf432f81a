"""What `lars evaluate`, `predict` and `export` look at: the weights of a run, or a model that timm knows by name.

RUN is a run folder, read as data as in `lars verify`: the recipe and its `model.py` are those of this repository, or
`--recipe`. MODEL is a name of timm (`resnet50.a1_in1k`), of the Hub (`hf-hub:timm/resnet50.a1_in1k`) or an exported
folder (`local-dir:FOLDER`), with its pretrained weights, in the size and with the crop that it is published with.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import timm
import torch
from torch import nn

from lars.commands.verify import overrides_of, recipe_of
from lars.data.augment import evaluation_image
from lars.data.footers import check_no_null
from lars.data.index import Index, resolve
from lars.data.row_group import DAMAGED
from lars.data.source import Source
from lars.engine.average import parted
from lars.engine.build import build_model
from lars.recipe import config
from lars.recipe.keys import Augment, Data, Model, Recipe
from lars.recipe.refusal import RecipeError, one_line, printable
from lars.run import checkpoint
from lars.run.reading import read_result
from lars.run.resume import read_fitting

_RESAMPLING = {"bicubic": "mixed", "bilinear": "bilinear"}  # timm's interpolation in evaluation: augment.resampling
_NAMED = ("hf-hub:", "hf_hub:", "local-dir:")  # prefixes of timm's names of models


class Subject(NamedTuple):
    """A model in evaluation mode, how its images are prepared, and where it comes from."""

    model: nn.Module
    recipe: Recipe
    title: str
    folder: Path  # for what is written about it
    names: list[str] | None  # of the classes
    steps: int | None = None  # of a run
    recipe_file: Path | None = None

    def place(self, name: str) -> Path:
        """RUN/name, where something about the run is written.

        Raises:
            RecipeError: it is a link or a pipe, or holds one: what is written there would lead out of the folder.
        """
        folder = self.folder / name
        for path in (folder, *(folder.iterdir() if folder.is_dir() else ())):
            if path.is_symlink() or path.is_fifo():
                raise RecipeError(
                    f"{path} is a link or a pipe, and what is written there goes elsewhere: remove it, or give --out"
                )
        return folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which model it is, and where the data are."""
    parser.add_argument("subject", metavar="RUN|MODEL")
    parser.add_argument("--recipe", type=Path, help="of a run: its recipe's file (default: recipes/<name>.yaml)")
    parser.add_argument("--data", help="data.path (default: the recipe's)")
    parser.add_argument("--best", action="store_true", help="of a run: its best checkpoint (checkpoint.keep_best)")
    parser.add_argument("--ema", action="store_true", help="of a run: the moving average of its weights")


def subject(args: argparse.Namespace) -> Subject:
    """The model that the arguments name.

    Raises:
        RecipeError: there is none, or it cannot be built or read.
    """
    run = Path(args.subject)
    if args.subject.startswith(_NAMED) or not run.is_dir() and timm.is_model(args.subject):
        if args.recipe or args.ema or args.best:
            raise RecipeError(f"--recipe, --best and --ema are of a run: leave them out for {args.subject}")
        return _published(args.subject, args.data)
    if not run.is_dir():
        raise RecipeError(f"{args.subject} is neither the folder of a run nor a model of timm: see `lars evaluate -h`")
    return _trained(run, args)


def _trained(run: Path, args: argparse.Namespace) -> Subject:
    """With the weights of the newest whole checkpoint, or of the one that was best by its own evaluation."""
    recipe_file = args.recipe or recipe_of(run, read_result(run, ("recipe", "steps")))
    keys = [*overrides_of(run, recipe_file), *([f"data.path={args.data}"] if args.data else [])]
    recipe = config.load(recipe_file, keys)
    there = sorted(checkpoint.saved(run), key=checkpoint.top1_of) if args.best else checkpoint.saved(run)
    found = ((path, state) for path in reversed(there) if (state := checkpoint.verified(path)))
    path, state = next(found, (None, None))
    if path is None or state is None:
        raise RecipeError(f"{run} has no checkpoint that is whole: train it again, or fetch its checkpoints/ folder")
    model, _ = build_model(recipe)
    weights, beside = read_fitting(path, state, recipe, model)
    _, averages = parted(beside)
    if args.ema and not averages:
        raise RecipeError(f"{run} keeps no moving average: its recipe has no ema_decay")
    checkpoint.load_weights(weights | averages if args.ema else weights, state, model)
    what = f"{recipe.name}{', moving average' * args.ema}, step {state.step}"
    return Subject(model.eval(), recipe, what, run, class_names(recipe.data), state.step, recipe_file)


def _published(name: str, place: str | None) -> Subject:
    """A model of timm with its pretrained weights; the recipe has only what evaluation asks for."""
    try:
        model = timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # whatever timm and the Hub make of a name, of a folder and of no network
        raise RecipeError(f"{name} cannot be loaded: {one_line(error)}") from None
    how = timm.data.resolve_model_data_config(model, use_test_size=True)
    size, interpolation = how["input_size"][-1], how["interpolation"]
    if interpolation not in _RESAMPLING or how["crop_mode"] != "center":
        raise RecipeError(
            f"{name} is evaluated with {interpolation} and crop {how['crop_mode']}: timm's validate.py can"
        )
    recipe = Recipe(
        model=Model(name, model.num_classes, size),
        data=Data(path=place or ""),
        augment=Augment(
            eval_resize=math.floor(size / how["crop_pct"]),
            resampling=_RESAMPLING[interpolation],
            mean=[255 * value for value in how["mean"]],
            std=[255 * value for value in how["std"]],
        ),
        bn_group=None,
        global_batch=64,
        precision="fp32",
        name=name,
        seed=0,
        trackers=[],
    )
    recipe.run_dir = f"runs/evaluation/{name.rpartition(':')[2].strip('/').replace('/', '--')}"
    names = model.pretrained_cfg.get("label_names")
    return Subject(model, recipe, name, Path(recipe.run_dir), list(names) if names else None)


def class_names(data: Data) -> list[str] | None:
    """As the data set's own schema has them; None where the data are not here, or have none."""
    try:
        schema = pq.read_schema(resolve(data)[data.val_split][0])
        told = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][data.label_column]
        return [str(name) for name in told["names"]]
    except (RecipeError, OSError, LookupError, TypeError, ValueError):  # pyarrow's are ValueErrors
        return None


def first_rows(index: Index, data: Data) -> pa.Table:
    """Columns `bytes` and `label` of the first row group that has rows; `bytes` is null where an image is.

    Raises:
        RecipeError: a label is null, or the row group cannot be read.
    """
    place = int(np.argmax(index.rows > 0))
    name, group = index.files[index.file[place]], int(index.group_in_file[place])
    with Source(name, data.retry_seconds).files.open(name) as stream:
        try:
            rows = pq.ParquetFile(stream).read_row_group(group, columns=[data.image_column, data.label_column])
        except DAMAGED as error:
            raise RecipeError(f"{index.place(place)} cannot be read: {one_line(error)}") from None
    check_no_null(rows[data.label_column], name, group)
    return pa.table({"bytes": pc.struct_field(rows[data.image_column], "bytes"), "label": rows[data.label_column]})


def name_of(label: int, names: list[str] | None) -> str:
    return printable(names[label]) if names and label < len(names) else f"class {label}"


def pixels_of(data: bytes, recipe: Recipe) -> torch.Tensor:
    """float32 (1, 3, size, size), on the CPU: an image as the model has it in evaluation; BadImage if it is none."""
    view = evaluation_image(data, recipe.augment, recipe.model.image_size)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (recipe.augment.mean, recipe.augment.std))
    return torch.from_numpy(view.copy()).permute(2, 0, 1)[None].float().sub_(mean).div_(std)
