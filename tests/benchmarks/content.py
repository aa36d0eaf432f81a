"""`python -m tests.benchmarks.content [--json]`: what hashing each row group costs the loader.

CPU time of a whole loader, its reader and its decoder included, that makes 224-pixel training views of photographs:
with BLAKE3, and with a stand-in that hashes nothing, in turn; and of the hash alone, over the same files in pieces of a
row group, which tells more than that difference: a loader's rounds differ by 2 %. Figures are minima: other work only
adds.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

from lars.data import reader
from lars.data.content import row_group_hash
from lars.data.index import build_indexes
from lars.data.loader import training_batches
from lars.data.order import Order
from lars.recipe import config
from lars.run.sources import commit
from tests.benchmarks import photos

ROUNDS, IMAGES, BATCH = 30, 1024, 64
RECIPE = Path(__file__).parents[2] / "recipes/resnet50/lars-b32k-90ep.yaml"


def nothing(data: bytes) -> bytes:
    """The control: `row_group_hash` without its work."""
    return bytes(32)


def spent(recipe: config.Recipe, row_group_hash: Callable[[bytes], bytes]) -> float:
    """Seconds of CPU time for one epoch of a loader, from its start to its end."""
    reader.row_group_hash = row_group_hash  # before the reader's process is forked
    index, _ = build_indexes(recipe.data, recipe.model.num_classes)
    began = _cpu_time()
    order = Order(index, 0, BATCH, BATCH)
    batches = training_batches(order, index, recipe, [range(BATCH)], 0, IMAGES // BATCH)
    for _ in batches:
        continue
    batches.close()
    return _cpu_time() - began


def _cpu_time() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def measure(folder: Path) -> dict[str, float]:
    """Milliseconds of CPU time an image, with and without the hash, and of it alone."""
    photos.write(folder, IMAGES)
    batch = (f"global_batch={BATCH}", f"bn_group={BATCH}", f"runtime.micro_batch={BATCH}", "data.workers=1")
    recipe = config.load(RECIPE, [f"data.path={folder}", f"model.num_classes={photos.CLASSES}", *batch])
    rounds = [(spent(recipe, row_group_hash), spent(recipe, nothing)) for _ in range(ROUNDS)]
    best = {name: min(times) / IMAGES * 1e3 for name, times in zip(("with hash", "without"), zip(*rounds))}
    return best | {"hash alone": min(alone(folder) for _ in range(ROUNDS)) / IMAGES * 1e3}


def alone(folder: Path) -> float:
    """Seconds of CPU time to hash all training images once."""
    pieces = [file.read_bytes() for file in folder.glob("**/train-*.parquet")]
    size = sum(map(len, pieces)) * photos.ROW_GROUP // IMAGES
    began = _cpu_time()
    for piece in pieces:
        for start in range(0, len(piece), size):
            row_group_hash(memoryview(piece)[start : start + size])
    return _cpu_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        best = measure(Path(temporary))
    result = {
        "milliseconds_an_image": {key: round(value, 4) for key, value in best.items()},
        "ratio": round(best["with hash"] / best["without"], 4),
        "share_of_the_hash": round(best["hash alone"] / best["without"], 4),
        "commit": commit(),
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result, indent=1) if args.json else result)


if __name__ == "__main__":
    main()
