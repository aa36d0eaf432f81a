"""Top-1 and top-5 of exactly the whole split, the same at any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lars.data.index import Index
from lars.data.loader import Batch, evaluation_batches
from lars.data.source import BadImages
from lars.engine.base import Engine
from lars.exact.reduction import OrderFreeSum
from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe


@dataclass(frozen=True)
class Evaluation:
    """`scores` are "loss", "top1", "top5" (per cent) and "images"; None if stopped, or if a process had no samples.

    "ema_loss", "ema_top1" and "ema_top5" are those of the moving average of the weights, if there is one.
    """

    scores: dict[str, float] | None
    data_error: Exception | None = None  # why this process had none

    @property
    def line(self) -> str:
        scores = self.scores
        average = f" (moving average: {scores['ema_top1']:.2f} %)" if "ema_top1" in scores else ""
        return f"top-1 {scores['top1']:.2f} %{average}, top-5 {scores['top5']:.2f} %"


def evaluate(
    engine: Engine,
    recipe: Recipe,
    index: Index,
    plan: BatchPlan,
    stopping: Callable[[int], bool],
    stop: Callable[[], bool],
) -> Evaluation:
    """The weights, and their moving average if there is one, over the whole split: see `evaluate_weights`."""
    chunk = plan.micro_batch
    own = evaluate_weights(engine, recipe, index, chunk, stopping, stop)
    if engine.average is None or own.scores is None:
        return own
    turns = -(-index.samples // chunk)  # what follows comes after those, for the watchdog
    with engine.average.in_place():
        other = evaluate_weights(engine, recipe, index, chunk, lambda turn: stopping(turns + turn), stop)
    if other.scores is None:
        return other
    return Evaluation(own.scores | {f"ema_{name}": other.scores[name] for name in ("loss", "top1", "top5")})


@torch.no_grad()
def evaluate_weights(
    engine: Engine,
    recipe: Recipe,
    index: Index,
    chunk: int,
    stopping: Callable[[int], bool],
    stop: Callable[[], bool],
    look: Callable[[Batch, Tensor, Tensor], None] = lambda batch, logits, best: None,
) -> Evaluation:
    """Loss, top-1 and top-5 over every image once.

    The split is cut into chunks of `chunk` samples, the last one shorter; processes take chunks, so no sample is
    padded or seen twice, and the chunks do not depend on the number of processes. All ask `stopping` before each
    chunk; a process that waits for data asks `stop`.

    Args:
        look: is given each batch of this process, its logits (n, classes) and predictions (n,).

    Raises:
        RuntimeError: the images counted are not the split's.
        DataError: some of them cannot be decoded.
        FloatingPointError: the loss is not finite.
    """
    chunks, processes = -(-index.samples // chunk), engine.accelerator.num_processes
    mine = range(engine.rank * chunks // processes, (engine.rank + 1) * chunks // processes)
    total = OrderFreeSum([], passes=1, floats=1, counts=5, device=engine.device)
    engine.eval_module.eval()
    batches = evaluation_batches(index, recipe, chunk, mine, engine.device)
    batches.stop, data_error = stop, None
    hits, images, bad = torch.zeros(2, dtype=torch.int64, device=engine.device), 0, 0  # of a GPU read once, at the end
    for turn in range(-(-chunks // processes)):
        if stopping(turn):
            batches.close()
            return Evaluation(None, data_error)
        # where a forward gathers weights all processes take part, also one whose chunks have ended
        if turn >= len(mine):
            engine.logits(torch.zeros(1, 3, recipe.model.image_size, recipe.model.image_size))
            continue
        first = mine[turn] * chunk
        batch = batches.take(min(chunk, index.samples - first))
        data_error = data_error or batch.data_error
        labels = batch.labels.to(engine.device, non_blocking=True)
        logits = engine.logits(batch.images)
        total.add_floats(F.cross_entropy(logits, labels, reduction="sum").view(1))
        best = logits.topk(min(5, logits.shape[1])).indices
        right = best == labels[:, None]
        look(batch, logits, best[:, 0])
        hits += torch.stack([right[:, 0].sum(), right.sum()])
        images, bad = images + len(labels), bad + batch.bad
    batches.close()
    total.add_counts([*hits.tolist(), images, bad, data_error is not None])
    engine.eval_module.train()
    sums = total.finish()
    top1, top5, images, bad, stand_ins = sums.counts
    if stand_ins:
        return Evaluation(None, data_error)
    if bad:
        raise BadImages(
            f"{bad} images of the validation split cannot be decoded (named above), and its accuracy would be another "
            "split's: repair the data, which is another run, so give another run_dir"
        )
    if sums.bad_floats:
        raise FloatingPointError("the evaluation loss is not finite")
    if images != index.samples:
        raise RuntimeError(f"evaluated {images} images, but the split has {index.samples}")
    shares = {"loss": float(sums.floats[0]) / images, "top1": 100 * top1 / images, "top5": 100 * top5 / images}
    return Evaluation({**shares, "images": images})
