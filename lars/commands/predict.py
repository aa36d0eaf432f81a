"""`lars predict RUN|MODEL IMAGE...`: the classes that a trained model sees in pictures.

lars predict runs/mine/first/seed-0 holiday/*.jpg
lars predict hf-hub:timm/resnet50.a1_in1k cat.jpg --top 3 --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from lars.commands.subject import Subject, add_arguments, name_of, pixels_of, subject
from lars.data.decode import MAX_BYTES, BadImage
from lars.recipe.refusal import RecipeError, refuses
from lars.run.reading import read_bytes


def predict(of: Subject, file: Path, top: int) -> list[tuple[str, float]]:
    """The `top` likeliest classes of one picture, with their probabilities.

    Raises:
        RecipeError: there is no such file, or it is no image.
    """
    if (data := read_bytes(file, MAX_BYTES)) is None:
        raise RecipeError(f"{file}: no such file")
    try:
        pixels = pixels_of(data, of.recipe)
    except BadImage as error:
        raise RecipeError(f"{file} is no image that can be read: {error}") from None
    with torch.no_grad():
        shares = of.model(pixels).float().softmax(1)[0]
    best = shares.topk(min(top, len(shares)))
    return [(name_of(int(label), of.names), float(share)) for share, label in zip(best.values, best.indices)]


@refuses(RecipeError, OSError)
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--top", type=int, default=5, help="how many classes of each (default: 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a picture")
    args = parser.parse_args(arguments)
    if args.top < 1:
        raise RecipeError(f"--top {args.top}: give 1 or more")
    of = subject(args)
    for file in args.images:
        found = predict(of, file, args.top)
        if args.json:
            print(json.dumps({"image": str(file), "classes": dict(found)}), flush=True)
        else:
            print(f"{file}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in found), flush=True)
    return 0
