"""`lars new NAME --data FOLDER [--model M] [--pretrained RUN|MODEL]`: a recipe for your own images.

    lars new flowers --data ~/Pictures/flowers
    lars new flowers-tuned --data ~/Pictures/flowers --pretrained hf-hub:timm/resnet18.a1_in1k

FOLDER holds a folder of images for each class, or train/<class>/ and val/<class>/, or Parquet files. Images are packed
once, into FOLDER-parquet beside it. The recipe, recipes/NAME/MODEL.yaml, begins as recipes/starter/ has it, with every
key explained. With --pretrained it begins with those weights, which are copied beside it; where the number of classes
is another one, the last layer begins anew. Run it in the folder that has recipes/.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import timm
import yaml
from safetensors.torch import save_model
from torch import nn

from lars.commands.convert import pack
from lars.commands.subject import class_names, first_rows, name_of, subject
from lars.data.decode import BadImage, Encoded
from lars.data.footers import check_label_range, check_no_null
from lars.data.forked import from_a_child
from lars.data.index import Index, build_indexes
from lars.engine.build import build_model
from lars.optim.key import CORE
from lars.recipe import config
from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Data, Recipe, declared, neutral
from lars.recipe.refusal import RecipeError, did_you_mean, refuses

STARTER, FINETUNE = Path("recipes/starter/resnet18.yaml"), Path("recipes/starter/finetune.yaml")
_MOST_CLASSES = 1_000_000  # more than any data set has; `build_indexes` checks the files with it
_SIDE = 256  # what packed images are shrunk to
_EPOCHS = ((2_000, 30), (10_000, 20), (math.inf, 15))  # up to so many images, so many epochs from scratch


def files_of(folder: Path) -> Path:
    """The Parquet files of --data: of a folder of images, those that are packed beside it."""
    if not folder.is_dir():
        raise RecipeError(f"--data {folder} is no folder")
    return folder if any(folder.glob("*.parquet")) else pack(folder, "--resize", str(_SIDE))


def look(data: Data, names: list[str] | None) -> tuple[int, int, str]:
    """The number of classes, the training split's size, and what a person wants to know of both splits in a line.

    There are as many classes as have names, or else one more than the largest training label.
    """
    train, val = build_indexes(data, len(names) if names else _MOST_CLASSES)  # says what is wrong with the files
    trained, held = labels_of(train, data), labels_of(val, data)
    classes = len(names) if names else int(trained.max()) + 1
    for labels, split in ((trained, data.train_split), (held, data.val_split)):
        check_label_range(labels.min(), labels.max(), classes, f"split {split!r} of {data.path}")
    sizes = []
    for image in first_rows(train, data)["bytes"].slice(0, 200).to_pylist():
        with suppress(BadImage):
            encoded = Encoded(image or b"")
            sizes.append((encoded.width, encoded.height))
    counts = np.bincount(trained, minlength=classes)
    few = int(counts.argmin())
    fewest = f"the smallest class, {name_of(few, names)}, has {counts[few]:,}"
    width, height = np.median(sizes, axis=0) if sizes else (0, 0)
    images = f"{train.samples:,} training and {val.samples:,} validation images of {classes} classes"
    return classes, train.samples, f"{images}; {fewest}; they are {width:.0f} x {height:.0f} pixels (median)"


def labels_of(index: Index, data: Data) -> np.ndarray:
    """The labels of all rows of a split whose files are local.

    Raises:
        RecipeError: some are null, or cannot be read.
    """

    def told() -> Iterator[np.ndarray]:
        for name in index.files:
            file = pq.ParquetFile(name)
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=[data.label_column], use_threads=False)
                check_no_null(rows[data.label_column], name, group)
                yield rows[data.label_column].to_numpy()

    found = from_a_child(told())
    if len(found) < len(index.rows):
        raise RecipeError(f"{index.place(len(found))} cannot be read, the file is damaged: put a whole one there")
    return np.concatenate(found)


def changes(
    args: argparse.Namespace, folder: Path, data: Data, classes: int, samples: int
) -> tuple[list[str], nn.Module | None]:
    """What the starter's keys become, as `key=value`, and the model whose weights the run begins with."""
    batch = 64
    while batch > 8 and batch * 8 > samples:
        batch //= 2
    given: dict[str, Any] = {"data.path": data.path, "model.num_classes": classes, "global_batch": batch}
    model, kwargs, trained = args.model or "resnet18", {}, None
    if args.pretrained:
        of = subject(argparse.Namespace(subject=args.pretrained, recipe=None, data=None, best=False, ema=False))
        trained = of.model
        model, kwargs = of.recipe.model.name, dict(of.recipe.model.kwargs)
        if of.recipe_file is None:
            model = trained.pretrained_cfg.get("architecture") or model.rpartition("/")[2]
        if args.model and args.model != model:
            raise RecipeError(f"--model {args.model} is not the model of {args.pretrained}, {model}: leave it out")
        overlay = {"file": str(folder / f"{model}.safetensors"), "num_classes": trained.num_classes}
        kwargs |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
        given |= {"model.kwargs": kwargs, "augment.mean": of.recipe.augment.mean, "augment.std": of.recipe.augment.std}
    elif not timm.is_model(model):
        raise RecipeError(f"timm has no model {model!r}{did_you_mean(model, timm.list_models())}")
    published = timm.get_pretrained_cfg(model)
    fixed = published.input_size[-1] if published and published.fixed_input_size else None
    normed = any(isinstance(layer, nn.BatchNorm2d) for layer in timm.create_model(model).modules())
    size = args.size or fixed or 64
    rate = (0.005 if args.pretrained else 0.05) * batch / 64
    given |= {"model.name": model, "model.image_size": size, "augment.eval_resize": round(size * 1.125)}
    given |= {"optimizer.lr": rate, "bn_group": min(16, batch // 2) if normed else None}
    if not args.pretrained:
        given["epochs"] = next(epochs for most, epochs in _EPOCHS if samples <= most)
    return [f"{key}={json.dumps(value)}" for key, value in given.items()], trained


def written(recipe: Recipe, header: str) -> str:
    """A recipe with every key of the trajectory; those that are neutral stand behind a #."""
    known, flat = declared(type(recipe.optimizer)), config.flatten(recipe)
    lines, section = [header.rstrip(), _line("name", recipe.name, known["name"].metadata, False)], ""
    for key, one in known.items():
        if one.metadata["free"] and key != "data.path" or key == "model.weights_sha256":
            continue
        inside, _, last = key.rpartition(".")
        if inside and inside != section:
            lines.append(f"{inside}:")
        section = inside
        ordinary = neutral(one) != CORE and flat[key] == neutral(one)
        lines.append("  " * bool(inside) + _line(last, flat[key], one.metadata, ordinary))
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any, told: Any, ordinary: bool) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    unit = f" [{told['unit']}]" if told["unit"] else ""
    choices = f" (one of {', '.join(told['choices'])})" if told["choices"] else ""
    return f"{'# ' if ordinary else ''}{key}: {text}  # {told['what']}{unit}{choices}"


@refuses(RecipeError, OSError)
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="a folder of recipes/, as in flowers")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--model", help="a model of timm (default: resnet18)")
    parser.add_argument("--pretrained", metavar="RUN|MODEL", help="begin with the weights of a run or of a timm model")
    parser.add_argument("--size", type=int, help="pixels (default: 64, or what the model is made for)")
    args = parser.parse_args(arguments)
    if not STARTER.is_file():
        raise RecipeError(f"{STARTER} is not here: run it in the folder that has recipes/")
    if not re.fullmatch(r"[\w-][\w.-]*", args.name) or args.size is not None and args.size < 1:
        raise RecipeError(f"NAME={args.name} is a folder of recipes/, as in flowers, and --size is in pixels")
    folder = Path("recipes") / args.name
    data = Data(path=str(files_of(args.data).resolve()))
    names = class_names(data)
    classes, samples, said = look(data, names)
    keys, trained = changes(args, folder, data, classes, samples)
    recipe = config.load(FINETUNE if args.pretrained else STARTER, keys)
    recipe.name = f"{args.name}/{recipe.model.name}"
    file = folder / f"{recipe.model.name}.yaml"
    weights = file.with_suffix(".safetensors")
    if there := next(filter(Path.exists, (file, weights)), None):
        raise RecipeError(f"{there} is there already: give another NAME, or edit it")
    build_model(recipe)
    BatchPlan.of(recipe, samples, 2)
    folder.mkdir(parents=True, exist_ok=True)
    if trained is not None:
        save_model(trained, str(weights))
    header = f"# {recipe.model.name} for {args.data}. Lines behind a # have no effect; they show what could be said."
    file.write_text(written(recipe, f"{header}\n#\n#   lars reproduce {file}\n"))
    print(f"{said}\n{file}: edit it, look at what it trains on, and train; a run that was stopped goes on:\n")
    print(f"  lars show {file}\n  lars reproduce {file}")
    return 0
