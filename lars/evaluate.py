"""Top-1 and top-5 of exactly the whole split, the same at any number of processes."""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from lars.config import Recipe
from lars.data.index import Index
from lars.data.loader import evaluation_batches
from lars.data.source import BadImages
from lars.engine_plain import Engine
from lars.reduction import OrderFreeSum


@torch.no_grad()
def evaluate(
    engine: Engine, recipe: Recipe, index: Index, chunk: int, stopping: Callable[[int], bool], asked: Callable[[], bool]
) -> tuple[dict[str, float] | None, Exception | None]:
    """{"loss", "top1", "top5" (per cent), "images"} over every image once; None if it was stopped, or samples were lacking.

    The second value is what this process lacked.

    The split is cut into chunks of `chunk` samples, the last one shorter; processes take chunks, so no sample is padded
    or seen twice, and the chunks do not depend on the number of processes. `stopping` is asked before each chunk by all,
    `asked` while this process waits for data.

    Raises:
        RuntimeError: the images counted are not the split's.
        DataError: some of them cannot be decoded.
        FloatingPointError: the loss is not finite.
    """
    chunks, processes = -(-index.samples // chunk), engine.accelerator.num_processes
    mine = range(engine.rank * chunks // processes, (engine.rank + 1) * chunks // processes)
    total = OrderFreeSum([], passes=1, floats=1, counts=5, device=engine.device)
    engine.evaluated.eval()
    batches = evaluation_batches(index, recipe, chunk, mine, engine.device)
    batches.stop, lacking = asked, None
    for turn in range(-(-chunks // processes)):
        if stopping(turn):
            batches.close()
            return None, lacking
        if turn >= len(mine):  # where a forward gathers weights all processes take part, also one whose chunks have ended
            engine.logits(engine.evaluated, torch.zeros(1, 3, recipe.model.image_size, recipe.model.image_size))
            continue
        first = mine[turn] * chunk
        batch = batches.take(min(chunk, index.samples - first))
        lacking = lacking or batch.lacking
        labels = batch.labels.to(engine.device)
        logits = engine.logits(engine.evaluated, batch.images)
        total.add_floats(F.cross_entropy(logits, labels, reduction="sum").view(1))
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        total.add_counts([int(hits[:, 0].sum()), int(hits.sum()), len(labels), batch.bad, lacking is not None])
    batches.close()
    engine.evaluated.train()
    sums = total.finish()
    top1, top5, images, bad, stand_ins = sums.counts
    if stand_ins:
        return None, lacking
    if bad:
        raise BadImages(
            f"{bad} images of the validation split cannot be decoded (named above), and its accuracy would be another split's: "
            "repair the data, which is another run, so give another run_dir"
        )
    if sums.bad_floats:
        raise FloatingPointError("the evaluation loss is not finite")
    if images != index.samples:
        raise RuntimeError(f"evaluated {images} images, but the split has {index.samples}")
    shares = {"loss": float(sums.floats[0]) / images, "top1": 100 * top1 / images, "top5": 100 * top5 / images}
    return {**shares, "images": images}, None
