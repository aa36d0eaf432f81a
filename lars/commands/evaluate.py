"""`lars evaluate RUN|MODEL [--data PATH]`: top-1 and top-5 of every image of a split, in all and class by class.

    lars evaluate runs/mine/first/seed-0
    lars evaluate hf-hub:timm/resnet50.a1_in1k --data ILSVRC/imagenet-1k

The second line is the check of data and evaluation before anybody pays for a training: it has to reach the model's
published accuracy. On several processes the numbers are the same:

    accelerate launch --config_file launch/cpu-2.yaml -m lars evaluate runs/mine/first/seed-0

Writes evaluation.json, the picture mistakes.png and, up to a hundred classes, confusion.png into RUN/evaluation, or
--out; `lars report RUN` shows them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor

from lars.commands.subject import Subject, add_arguments, name_of, subject
from lars.data.index import build_indexes
from lars.data.loader import Batch
from lars.data.source import DataError
from lars.engine.evaluate import evaluate_weights
from lars.engine.plain import Plain
from lars.recipe.launched import Launched, is_first
from lars.recipe.refusal import RecipeError
from lars.report.classes import MOST_IN_A_PICTURE, Mistake, confusion_picture, mistakes_picture
from lars.run.folder import weights_sha256
from lars.run.peers import Peers

_MISTAKES = 12
_CHUNK = 64  # images at a time where no recipe says


class Seen:
    """What this process's images are taken for."""

    def __init__(self, classes: int, names: list[str] | None, device: torch.device) -> None:
        self.names = names
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)  # by label, then by prediction
        self.mistakes: list[Mistake] = []

    def look(self, batch: Batch, logits: Tensor, best: Tensor) -> None:
        """Count a batch by its predictions, and keep the mistakes with the largest shares: see `evaluate_weights`."""
        labels = batch.labels.to(logits.device)
        self.confusion.index_put_((labels, best), torch.ones_like(labels), accumulate=True)
        shares = logits.float().softmax(1).gather(1, best[:, None])[:, 0]
        for place in (best != labels).nonzero()[:, 0].tolist():
            who = (name_of(int(label[place]), self.names) for label in (labels, best))
            pixels = batch.images[place].permute(1, 2, 0).numpy().copy()
            self.mistakes.append(Mistake(float(shares[place]), int(batch.ids[place]), *who, pixels))
        self.mistakes = worst(self.mistakes)


def worst(mistakes: list[Mistake]) -> list[Mistake]:
    """Those with the largest shares; of equal ones the first of the split."""
    return sorted(mistakes, key=lambda mistake: (-mistake.share, mistake.id))[:_MISTAKES]


def evaluated(of: Subject, split: str, peers: Peers, launched: Launched) -> tuple[dict[str, Any], Seen]:
    """Scores, and what all images are taken for; the same on all processes, whatever their number.

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
    seen = Seen(of.recipe.model.num_classes, of.names, engine.device)
    chunk = of.recipe.runtime.micro_batch or of.recipe.bn_group or _CHUNK
    scores = evaluate_weights(engine, of.recipe, index, chunk, lambda turn: False, lambda: False, seen.look)
    if scores.scores is None:
        raise scores.data_error or DataError("another process could not read its images")
    seen.confusion = seen.confusion.cpu()
    if peers.group is not None:
        dist.all_reduce(seen.confusion, group=peers.group)
    seen.mistakes = worst(gather_object(seen.mistakes))
    found = {"model": of.title, "weights_sha256": digest, "split": split, "fingerprint": index.fingerprint}
    return found | scores.scores, seen


def by_class(confusion: Tensor, names: list[str] | None) -> list[dict[str, Any]]:
    """Images and top-1 of each class that has images, and what its images are mostly taken for."""
    found = []
    for label, row in enumerate(confusion.tolist()):
        if images := sum(row):
            entry = {"class": name_of(label, names), "images": images, "top1": round(100 * row[label] / images, 2)}
            times, other = max(((count, other) for other, count in enumerate(row) if other != label), default=(0, 0))
            found.append(entry | ({"taken_for": name_of(other, names), "times": times} if times else {}))
    return found


def write(found: dict[str, Any], seen: Seen, out: Path) -> None:
    """The numbers and the pictures, and in a few lines what they say."""
    out.mkdir(parents=True, exist_ok=True)
    confusion, title, pictures = seen.confusion, f"{found['model']}: top-1 {found['top1']:.2f} %", []
    found["classes"] = by_class(confusion, seen.names)
    if len(confusion) <= MOST_IN_A_PICTURE:
        found["confusion"] = confusion.tolist()
        found["names"] = [name_of(label, seen.names) for label in range(len(confusion))]
        (out / "confusion.png").write_bytes(confusion_picture(found["confusion"], found["names"], title))
        pictures.append("confusion.png")
    kept = ("share", "id", "label", "prediction")
    found["mistakes"] = [{name: getattr(mistake, name) for name in kept} for mistake in seen.mistakes]
    if seen.mistakes:
        picture = mistakes_picture(seen.mistakes, f"{title}; the mistakes that it is most certain of")
        (out / "mistakes.png").write_bytes(picture)
        pictures.append("mistakes.png")
    (out / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")
    lowest = sorted(found["classes"], key=lambda entry: entry["top1"])[:5]
    scores = f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %, loss {found['loss']:.4f}"
    print(f"{found['model']}: {scores} of {found['images']:,} images of {found['split']}")
    print("lowest: " + "; ".join(f"{x['class']} {x['top1']:.1f} %{_taken(x)}" for x in lowest))
    print(f"{out}: {', '.join(['evaluation.json', *pictures])}")


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
            out = args.out or (of.folder if of.steps is None else of.place("evaluation"))
        except RecipeError as error:
            refused = error
        peers = Peers.meet(refused)
        launched = Launched.read(of.recipe)
        found, seen = evaluated(of, args.split or of.recipe.data.val_split, peers, launched)
        if peers.rank == 0:
            write(found, seen, out)
        return 0
    except (RecipeError, DataError, OSError) as error:
        if is_first():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, DataError) else 2
    finally:
        if peers is not None:
            peers.part()
