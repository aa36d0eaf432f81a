"""`lars export RUN`: a run's weights as a folder that plain timm loads, without this project.

    lars export runs/demo/alexnet/seed-0 --onnx

writes RUN/export: `model.safetensors`, `config.json` (architecture, mean, std, crop, interpolation, names of the
classes), the `model.py` that registers the architecture, if the recipe has one, and README.md, a model card. Then,
anywhere:

    model = timm.create_model("local-dir:runs/demo/alexnet/seed-0/export", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))

`--onnx` adds model.onnx, for any number of images at once, and compares its logits with the model's own. Whether the
world may see it is yours to say: `hf upload USER/NAME RUN/export` puts the folder on the Hub.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from lars.commands.subject import Subject, add_arguments, first_rows, pixels_of, subject
from lars.data.decode import BadImage
from lars.data.index import build_indexes
from lars.data.source import DataError
from lars.recipe.keys import Recipe
from lars.recipe.refusal import RecipeError, refuses
from lars.run.folder import weights_sha256
from lars.run.reading import read_result

_COMPARED = 64  # images


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
            # of the others bilinear is the nearest that timm has; the model card says so
            "interpolation": "bicubic" if augment.resampling == "mixed" else "bilinear",
            # timm rounds size / crop_pct down, so half a pixel more gives `eval_resize` itself
            "crop_pct": size / (augment.eval_resize + 0.5),
        },
    )
    if model_file.is_file():
        shutil.copyfile(model_file, out / "model.py")


def write_onnx(of: Subject, file: Path) -> str:
    """The model for onnxruntime; what a comparison of its logits with the model's own has found.

    Raises:
        RecipeError: a package is missing, or the logits differ by more than rounding.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise RecipeError(f"--onnx needs {error.name}: pip install onnx onnxruntime onnxscript") from None
    size = of.recipe.model.image_size
    any_number = ({0: torch.export.Dim("images")},)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of operators that are not used
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            of.model,
            (torch.zeros(2, 3, size, size),),
            str(file),
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes=any_number,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    pixels, which = _some_pixels(of)
    with torch.no_grad():
        ours = of.model(pixels)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])
    away, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
    if away > 1e-3 * largest:  # rounding is far below: 1e5 additions in another order, sqrt(1e5) * 2^-24 = 2e-5
        raise RecipeError(f"{file} gives other logits than the model: {away:.2g} off, of at most {largest:.2g}")
    return f"onnxruntime's logits of {len(pixels)} {which} are at most {away:.1e} off, of at most {largest:.2g}"


def _some_pixels(of: Subject) -> tuple[Tensor, str]:
    """Images of the validation split as the model has them, or noise where the data are not here."""
    data, size, images = of.recipe.data, of.recipe.model.image_size, []
    with suppress(RecipeError, DataError, OSError, BadImage):
        (validation,) = build_indexes(data, of.recipe.model.num_classes, (data.val_split,))
        for image in first_rows(validation, data)["bytes"].slice(0, _COMPARED).to_pylist():
            images.append(pixels_of(image or b"", of.recipe))
    if images:
        return torch.cat(images), "validation images"
    return torch.randn(_COMPARED, 3, size, size), "images of noise"


def model_card(of: Subject, result: dict[str, Any], digest: str) -> str:
    """What a stranger has to know of the weights, from the run itself."""
    recipe, top1 = of.recipe, result.get("top1")
    score = f"{top1:.2f} % of the validation split, of this run alone" if top1 is not None else "not evaluated"
    rows = {
        "architecture": f"timm's `{recipe.model.name}`, {recipe.model.num_classes} classes, "
        f"{recipe.model.image_size} pixels",
        "recipe": f"`{recipe.name}`, seed {recipe.seed}: {recipe.optimizer.name}, batch {recipe.global_batch}, "
        f"{recipe.epochs:g} epochs; {of.steps} steps done",
        "top-1": score,
        "reproducibility": str(result.get("reproducibility")),
        "weights_sha256": f"`{digest}`",
        "data": f"`{recipe.data.path}`, fingerprint `{result.get('data_fingerprint')}`",
        "trained by": f"`accelerate launch recipes/train.py --config recipes/{recipe.name}.yaml`, "
        f"commit `{result.get('commit')}`",
    }
    if (way := recipe.augment.resampling) not in ("mixed", "bilinear"):
        rows["images"] = f"resized with `augment.resampling: {way}`; timm does not have it and takes bilinear"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"---\nlibrary_name: timm\ntags: [image-classification, timm]\n---\n# {recipe.name}\n\n"
        f"| | |\n| --- | --- |\n{table}\n\n"
        "Limits: it knows the classes of its training images and no other, and says one of them of every picture. Its\n"
        "licence is bounded by that of the images, which this card does not know: say it here before you publish.\n"
    )


@refuses(RecipeError, OSError)
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--out", type=Path, help="default: RUN/export")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too")
    args = parser.parse_args(arguments)
    of = subject(args)
    if of.recipe_file is None:
        raise RecipeError(f"{args.subject} is no run: timm has it already")
    out, result = args.out or of.place("export"), read_result(of.folder)
    write_export(of.model, of.recipe, of.names, of.recipe_file.parent / "model.py", out)
    digest = weights_sha256(of.model.state_dict())
    (out / "README.md").write_text(model_card(of, result, digest))
    whole = "the run's own result" if digest == result.get("weights_sha256") else "not the result of a finished run"
    classes = "no class names (data.path is not here, or has none: --data)"
    classes = f"{len(of.names)} class names" if of.names else classes
    print(f"{out}: {of.title}, weights {digest[:16]} ({whole}), {classes}")
    if args.onnx:
        print(f"{out / 'model.onnx'}: {write_onnx(of, out / 'model.onnx')}")
    print(f'timm.create_model("local-dir:{out}", pretrained=True) loads it', end="")
    print(f", once {out / 'model.py'} has run" * (out / "model.py").exists())
    return 0
