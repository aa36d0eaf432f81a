"""`lars export RUN`: a run's weights as a folder that plain timm loads, without this project.

    lars export runs/demo/alexnet/seed-0

writes RUN/export: `model.safetensors`, `config.json` (architecture, mean, std, crop, interpolation, names of the
classes) and the `model.py` that registers the architecture, if the recipe has one. Then, anywhere:

    model = timm.create_model("local-dir:runs/demo/alexnet/seed-0/export", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))

RUN is read as data, as in `lars verify`: the recipe and its `model.py` are those of this repository, or `--recipe`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
from timm.models import save_for_hf
from torch import nn

from lars.commands.verify import overrides_of, recipe_of
from lars.data.index import resolve
from lars.engine.build import build_model
from lars.recipe import config
from lars.recipe.keys import Data, Recipe
from lars.recipe.refusal import RecipeError, refuses
from lars.run import checkpoint
from lars.run.folder import weights_sha256
from lars.run.reading import read_result
from lars.run.resume import read_fitting


def trained_model(run: Path, recipe: Recipe) -> tuple[nn.Module, checkpoint.State]:
    """The model in evaluation mode, with the weights of the newest whole checkpoint.

    Raises:
        RecipeError: there is none, it is of another model, or the model cannot be built.
    """
    found = ((path, state) for path in reversed(checkpoint.saved(run)) if (state := checkpoint.verified(path)))
    path, state = next(found, (None, None))
    if path is None or state is None:
        raise RecipeError(f"{run} has no checkpoint that is whole: train it again, or fetch its checkpoints/ folder")
    model, _ = build_model(recipe)
    weights, _ = read_fitting(path, state, recipe, model)
    checkpoint.load_weights(weights, state, model)
    return model.eval(), state


def class_names(data: Data) -> list[str] | None:
    """As the data set's own schema has them; None where the data are not here, or have none."""
    try:
        schema = pq.read_schema(resolve(data)[data.train_split][0])
        told = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][data.label_column]
        return [str(name) for name in told["names"]]
    except (RecipeError, OSError, KeyError, TypeError, ValueError):
        return None


def write_export(model: nn.Module, recipe: Recipe, names: list[str] | None, model_file: Path, out: Path) -> None:
    """The folder that timm calls `local-dir:`, and the Hub a timm model."""
    size, augment = recipe.model.image_size, recipe.augment
    save_for_hf(
        model,
        str(out),
        model_config={"label_names": names} if names else None,
        safe_serialization=True,
        data_config={
            "input_size": (3, size, size),
            "mean": tuple(value / 255 for value in augment.mean),
            "std": tuple(value / 255 for value in augment.std),
            "interpolation": "bicubic",
            # timm rounds size / crop_pct down, so half a pixel more gives `eval_resize` itself
            "crop_pct": size / (augment.eval_resize + 0.5),
        },
    )
    if model_file.is_file():
        shutil.copyfile(model_file, out / "model.py")


@refuses(RecipeError, OSError)
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--recipe", type=Path, help="its recipe's file (default: recipes/<name>.yaml)")
    parser.add_argument("--data", help="data.path, for the names of the classes (default: the recipe's)")
    parser.add_argument("--out", type=Path, help="default: RUN/export")
    args = parser.parse_args(arguments)
    result = read_result(args.run, ("recipe", "steps"))
    recipe_file = args.recipe or recipe_of(args.run, result)
    keys = [*overrides_of(args.run, recipe_file), *([f"data.path={args.data}"] if args.data else [])]
    recipe = config.load(recipe_file, keys)
    model, state = trained_model(args.run, recipe)
    names, out = class_names(recipe.data), args.out or args.run / "export"
    write_export(model, recipe, names, recipe_file.parent / "model.py", out)
    digest, claimed = weights_sha256(model.state_dict()), result.get("weights_sha256")
    whole = "the run's own result" if digest == claimed else f"step {state.step}, not the end of a finished run"
    classes = f"{len(names)} class names" if names else "no class names (data.path is not here, or has none: --data)"
    print(f"{out}: {recipe.model.name} after step {state.step}, weights {digest[:16]} ({whole}), {classes}")
    print(f'timm.create_model("local-dir:{out}", pretrained=True) loads it', end="")
    print(f", once {out / 'model.py'} has run" * (out / "model.py").exists())
    return 0
