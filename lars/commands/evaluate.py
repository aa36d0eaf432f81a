"""`lars evaluate RUN|MODEL [--data PATH]`: top-1 and top-5 of every image of a split, in all and class by class.

    lars evaluate runs/mine/first/seed-0
    lars evaluate hf-hub:timm/resnet50.a1_in1k --data ILSVRC/imagenet-1k

The second line is the check of data and evaluation before anybody pays for a training: it has to reach the model's
published accuracy. On several processes the numbers are the same:

    accelerate launch --config_file launch/cpu-2.yaml -m lars evaluate runs/mine/first/seed-0

Writes evaluation.json and, up to a hundred classes, the picture confusion.png into RUN/evaluation, or --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lars.commands.subject import Subject, add_arguments, name_of, subject
from lars.data.index import build_indexes
from lars.data.source import DataError
from lars.engine.evaluate import evaluate_weights
from lars.engine.plain import Plain
from lars.recipe.launched import Launched, is_first
from lars.recipe.refusal import RecipeError
from lars.run.folder import weights_sha256
from lars.run.peers import Peers

_MOST_IN_A_PICTURE = 100  # classes
_CHUNK = 64  # images at a time where no recipe says


def evaluated(of: Subject, split: str, peers: Peers, launched: Launched) -> tuple[dict[str, Any], Tensor]:
    """Scores and, by label and then by prediction, counts; the same on all processes, whatever their number.

    Raises:
        RecipeError: the data are not there, or the processes have other data or weights.
        DataError: an image cannot be read or decoded.
    """
    (index,) = build_indexes(of.recipe.data, of.recipe.model.num_classes, (split,))
    digest = weights_sha256(of.model.state_dict())
    peers.agree({"weights": digest, "data": index.fingerprint})
    of.recipe.trackers = []
    engine = Plain(of.recipe, launched)
    engine.prepare(of.model, [])
    confusion = torch.zeros(2 * (of.recipe.model.num_classes,), dtype=torch.int64, device=engine.device)
    chunk = of.recipe.runtime.micro_batch or of.recipe.bn_group or _CHUNK
    scores = evaluate_weights(engine, of.recipe, index, chunk, lambda turn: False, lambda: False, confusion)
    if scores.scores is None:
        raise scores.data_error or DataError("another process could not read its images")
    confusion = confusion.cpu()
    if peers.group is not None:
        dist.all_reduce(confusion, group=peers.group)
    found = {"model": of.title, "weights_sha256": digest, "split": split, "fingerprint": index.fingerprint}
    return found | scores.scores, confusion


def by_class(confusion: Tensor, names: list[str] | None) -> list[dict[str, Any]]:
    """Images and top-1 of each class that has images, and what its images are mostly taken for."""
    found = []
    for label, row in enumerate(confusion.tolist()):
        if images := sum(row):
            wrong = max((count, other) for other, count in enumerate(row) if other != label) if len(row) > 1 else (0, 0)
            entry = {"class": name_of(label, names), "images": images, "top1": round(100 * row[label] / images, 2)}
            taken = {"taken_for": name_of(wrong[1], names), "times": wrong[0]} if wrong[0] else {}
            found.append(entry | taken)
    return found


def picture(confusion: Tensor, names: list[str] | None, title: str, file: Path) -> None:
    """The share of each class's images that is taken for each class."""
    from matplotlib.figure import Figure

    shares = confusion.numpy() / np.maximum(confusion.sum(1, keepdim=True).numpy(), 1)
    size = 3.5 + 0.28 * len(shares)
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    labels = [name_of(label, names) for label in range(len(shares))]
    axes.set_xticks(range(len(shares)), labels, rotation=90)
    axes.set_yticks(range(len(shares)), labels)
    axes.set(xlabel="prediction", ylabel="label", title=title)
    if len(shares) <= 20:
        for row, column in np.ndindex(shares.shape):
            if shares[row, column] >= 0.005:
                dark = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", color=dark)
    figure.colorbar(image, ax=axes, label="per cent of the label's images", shrink=0.8)
    figure.savefig(file, dpi=110)


def write(found: dict[str, Any], confusion: Tensor, names: list[str] | None, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    found["classes"] = by_class(confusion, names)
    small = len(confusion) <= _MOST_IN_A_PICTURE
    if small:
        found["confusion"] = confusion.tolist()
        picture(confusion, names, f"{found['model']}: top-1 {found['top1']:.2f} %", out / "confusion.png")
    (out / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")
    worst = sorted(found["classes"], key=lambda entry: entry["top1"])[:5]
    scores = f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %, loss {found['loss']:.4f}"
    print(f"{found['model']}: {scores} of {found['images']:,} images of {found['split']}")
    print("lowest: " + "; ".join(f"{x['class']} {x['top1']:.1f} %{_taken(x)}" for x in worst))
    print(f"{out}: evaluation.json{' and confusion.png' * small}")


def _taken(entry: dict[str, Any]) -> str:
    return f" ({entry['times']} of {entry['images']} taken for {entry['taken_for']})" if "times" in entry else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--split", help="default: the recipe's data.val_split")
    parser.add_argument("--out", type=Path, help="default: RUN/evaluation, or runs/evaluation/MODEL")
    args = parser.parse_args(arguments)
    peers = of = refused = None
    try:
        try:
            of = subject(args)
            if not of.recipe.data.path:
                raise RecipeError(f"{of.title} brings no data: give --data")
        except RecipeError as error:
            refused = error
        peers = Peers.meet(refused)
        launched = Launched.read(of.recipe)
        found, confusion = evaluated(of, args.split or of.recipe.data.val_split, peers, launched)
        if peers.rank == 0:
            folder = of.folder if of.steps is None else of.folder / "evaluation"
            write(found, confusion, of.names, args.out or folder)
        return 0
    except (RecipeError, DataError, OSError) as error:
        if is_first():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, DataError) else 2
    finally:
        if peers is not None:
            peers.part()
