"""`python -m tests.benchmarks.loader [--workers N] [--json]`: images/s to 224-pixel training batches, ours and others'.

Every rival draws RandomResizedCrop (area 0.08-1) and a flip from the same photographs, in micro batches of 64, with N
workers (NVIDIA DALI: threads), and gives uint8, for normalising is the device's work; timm's `create_loader` stands
there twice: whole, as it is used (its prefetcher normalises, here on a core), and as far as uint8. The `datasets`
stream is read without `.shuffle`, which would add a sleep of 5 s to the end of every pass.

Rivals take turns in every round, each in a process of its own that ends before the next one starts, so that nothing of
one runs beside another. Start-up and the first batches, which come from filled queues, are not timed. Figures are
medians over rounds. Then ours with other numbers of workers, and what one core does. Photographs are made unless --data
names some.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import math
import multiprocessing as mp
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lars.exact.portable import cpu
from lars.recipe import config
from tests.benchmarks import photos

MICRO_BATCH, SIZE = 64, 224
BATCHES, WARM_UP, ROUNDS = 16, 4, 3  # batches of each worker; WARM_UP is what any rival prefetches at most
DALI = "NVIDIA DALI (CPU)"
GROWTH = (1, 2, 4)  # workers of ours
DECODED = 1000  # photographs that one core decodes
RECIPE = Path(__file__).parents[2] / "recipes/resnet50/lars-b32k-90ep.yaml"


@dataclass(frozen=True)
class Photographs:
    """The same photographs twice."""

    data: Path  # train-*.parquet, validation-*.parquet
    folder: Path  # an ImageFolder: one folder a class

    def recipe(self, workers: int) -> config.Recipe:
        classes = len(list(self.folder.iterdir()))
        batch = (
            f"global_batch={MICRO_BATCH}",
            f"bn_group={MICRO_BATCH}",
            f"runtime.micro_batch={MICRO_BATCH}",
            "epochs=1000",
        )
        return config.load(
            RECIPE,
            [
                f"data.path={self.data}",
                f"data.workers={workers}",
                f"model.num_classes={classes}",
                "augment.resampling=mixed",  # tests/benchmarks/resize.json has what the others take
                *batch,
            ],
        )

    def encoded(self) -> list[bytes]:
        import pyarrow.parquet as pq

        images: list[bytes] = []
        for file in sorted(self.data.glob("**/train-*.parquet")):
            for batch in pq.ParquetFile(file).iter_batches(100, columns=["image"]):
                if len(images) >= DECODED:
                    return images
                images += [image["bytes"] for image in batch["image"].to_pylist()]
        return images


# Rivals: (photographs, workers, number of images that will be asked for at most) -> batches (n, 3, 224, 224).


def ours(photographs: Photographs, workers: int, images: int) -> Iterator[np.ndarray]:
    from lars.data.index import build_indexes
    from lars.data.loader import training_batches
    from lars.data.order import Order

    recipe = photographs.recipe(workers)
    index, _ = build_indexes(recipe.data, recipe.model.num_classes)
    order = Order(index, recipe.seed, MICRO_BATCH, MICRO_BATCH)
    batches = training_batches(order, index, recipe, [range(MICRO_BATCH)], 0, images // MICRO_BATCH)
    try:
        for batch in batches:
            yield batch.images.numpy()
    finally:
        batches.close()


def timm(photographs: Photographs, workers: int, images: int, whole: bool = True) -> Iterator[np.ndarray]:
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("", str(photographs.folder), split="train", is_training=True)
    dataset.reader.samples *= math.ceil(
        images / len(dataset.reader.samples)
    )  # one long epoch: none begins while it is timed
    common = {"is_training": True, "color_jitter": None, "num_workers": workers, "device": torch.device("cpu")}
    prefetcher = create_loader(dataset, SIZE, MICRO_BATCH, **common)
    for batch, _ in prefetcher if whole else prefetcher.loader:
        yield batch.numpy()


def timm_uint8(photographs: Photographs, workers: int, images: int) -> Iterator[np.ndarray]:
    return timm(photographs, workers, images, whole=False)


def _transform() -> Callable:
    """torchvision's ImageNet reference, as far as uint8."""
    from torchvision import transforms as T

    return T.Compose([T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip(), T.PILToTensor()])


def torchvision(photographs: Photographs, workers: int, images: int) -> Iterator[np.ndarray]:
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(photographs.folder), _transform())
    dataset.samples *= math.ceil(images / len(dataset.samples))
    for batch, _ in torch.utils.data.DataLoader(dataset, MICRO_BATCH, shuffle=True, num_workers=workers):
        yield batch.numpy()


def datasets_streaming(photographs: Photographs, workers: int, images: int) -> Iterator[np.ndarray]:
    from datasets import load_dataset

    transform = _transform()
    warnings.filterwarnings("ignore", "To copy construct from a tensor")  # once a worker, from the torch format itself
    stream = load_dataset(str(photographs.data), split="train", streaming=True).repeat(None)
    stream = stream.map(
        lambda row: {"image": transform(row["image"].convert("RGB")), "label": row["label"]}
    ).with_format("torch")
    for batch in torch.utils.data.DataLoader(stream, MICRO_BATCH, num_workers=workers):
        yield batch["image"].numpy()


def dali(photographs: Photographs, workers: int, images: int) -> Iterator[np.ndarray]:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=MICRO_BATCH, num_threads=workers, device_id=None)
    def pipeline() -> tuple:
        files, labels = fn.readers.file(file_root=str(photographs.folder), random_shuffle=True)
        views = fn.decoders.image_random_crop(files, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        views = fn.resize(views, resize_x=SIZE, resize_y=SIZE, interp_type=types.INTERP_LINEAR)
        return fn.flip(views, horizontal=fn.random.coin_flip()), labels

    built = pipeline()
    built.build()
    while True:
        yield np.asarray(built.run()[0].as_tensor()).transpose(0, 3, 1, 2)


RIVALS = {
    "ours": ours,
    "timm": timm,
    "timm, as far as uint8": timm_uint8,
    "torchvision": torchvision,
    "datasets streaming": datasets_streaming,
    DALI: dali,
}


def rate(photographs: Photographs, rival: str, workers: int) -> float:
    """Images/s of one rival."""
    mp.set_start_method(
        "fork", force=True
    )  # a rival's workers would be started as this process was, which takes longer
    batches = RIVALS[rival](
        photographs, workers, (WARM_UP + BATCHES + WARM_UP) * workers * MICRO_BATCH
    )  # busy to the end

    def use(count: int) -> None:
        for _ in range(count):
            next(batches)[:, :, ::16].sum()

    use(WARM_UP * workers)
    started = time.perf_counter()
    use(BATCHES * workers)
    seconds = time.perf_counter() - started
    batches.close()
    return BATCHES * workers * MICRO_BATCH / seconds


def one_core(photographs: Photographs) -> dict[str, float]:
    """Images/s of one thread: bare decoding to full size (the limit without tricks), and the whole way to a view."""
    import cv2
    import simplejpeg
    from PIL import Image

    from lars.data.augment import draws_of, training_image

    cv2.setNumThreads(0)
    images, augment, transform = photographs.encoded(), photographs.recipe(1).augment, _transform()
    draws = draws_of(0, np.zeros(len(images), np.int64), np.arange(len(images)))
    ways = {
        "libjpeg-turbo, bare": lambda data, _: simplejpeg.decode_jpeg(data, "RGB"),
        "ours": lambda data, i: training_image(data, augment, SIZE, draws[i]),
        "torchvision": lambda data, _: transform(Image.open(io.BytesIO(data)).convert("RGB")),
    }
    rates = {}
    for name, way in ways.items():
        started = time.perf_counter()
        for i, data in enumerate(images):
            way(data, i)
        rates[name] = len(images) / (time.perf_counter() - started)
    return rates


def measure(photographs: Photographs, workers: int, rivals: list[str]) -> dict:
    """{"rivals", "ours_by_workers", "one_core"}; a rival that is not among `rivals` is None."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["timm.data", "torchvision.datasets", "datasets", "lars.data.loader"])

    def alone(work: Callable, *args: object) -> Any:
        with ProcessPoolExecutor(1, context) as process:
            return process.submit(work, *args).result()

    turns = [(rival, workers) for rival in rivals] + [("ours", count) for count in GROWTH if count != workers]
    rates: dict[tuple[str, int], list[float]] = {turn: [] for turn in turns}
    single: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for turn in turns:
            rates[turn].append(alone(rate, photographs, *turn))
        for name, found in alone(one_core, photographs).items():
            single.setdefault(name, []).append(found)
    median = {turn: statistics.median(found) for turn, found in rates.items()}

    def against_timm(rival: str) -> dict[str, Any] | None:
        if rival not in rivals:
            return None
        found, rounds = median[rival, workers], [round(r) for r in rates[rival, workers]]
        return {
            "images_per_second": round(found),
            "ratio_to_timm": round(found / median["timm", workers], 2),
            "rounds": rounds,
        }

    def growth(count: int) -> dict[str, float]:
        found, cores = median["ours", count], min(count, os.cpu_count() or 1)
        return {
            "images_per_second": round(found),
            "ratio_to_1": round(found / median["ours", 1], 2),
            "per_core": round(found / cores),
        }

    return {
        "rivals": {rival: against_timm(rival) for rival in RIVALS},
        "ours_by_workers": {count: growth(count) for count in sorted({workers, *GROWTH})},
        "one_core": {name: round(statistics.median(found)) for name, found in single.items()},
    }


def table(result: dict[str, Any]) -> str:
    """As lars/data/README.md shows it."""
    machine, workers = result["machine"], result["workers"]
    dali = (result["rivals"][DALI] or {}).get("images_per_second")
    lines = ["| loader | images/s | x timm | x DALI |", "| --- | --- | --- | --- |"]
    for rival, row in result["rivals"].items():
        rate = f"{row['images_per_second']:,} | {row['ratio_to_timm']:.2f}" if row else "not installed | "
        lines.append(
            f"| {rival} | {rate} | {row['images_per_second'] / dali:.2f} |"
            if row and dali
            else f"| {rival} | {rate} | |"
        )
    grown = ", ".join(
        f"{count}: {row['images_per_second']:,} ({row['per_core']:,} a core)"
        for count, row in result["ours_by_workers"].items()
    )
    alone = ", ".join(f"{name} {rate:,}" for name, rate in result["one_core"].items())
    said = (
        f"{machine['cpu']}, {machine['cores']} cores, {result['photos']['count']:,} photographs "
        f"of {result['photos']['mean_kb']:g} kB, {workers} workers."
    )
    return "\n".join([*lines, "", f"{said} Ours by workers: {grown}. One core, images/s: {alone}."])


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package it is in
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of train-*.parquet and validation-*.parquet; needs --folder")
    parser.add_argument("--folder", type=Path, help="the same photographs as an ImageFolder; needs --data")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes of each rival")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if (args.data is None) != (args.folder is None):
        parser.error(
            "--data and --folder hold the same photographs: give both or none (`tests.benchmarks.photos` writes both)"
        )
    rivals = [rival for rival in RIVALS if rival != DALI or installed("nvidia.dali")]
    if DALI not in rivals:
        print(f"{DALI} is not installed: pip install 'lars-imagenet[bench]'", file=sys.stderr)
    with tempfile.TemporaryDirectory() as made:
        if args.data is None:
            args.data, args.folder = Path(made, "parquet"), Path(made, "folder")
            photos.write(args.data, folder=args.folder)
        photographs = Photographs(args.data.resolve(), args.folder.resolve())
        sizes = [len(data) for data in photographs.encoded()]
        machine = {"cpu": cpu()[0], "cores": os.cpu_count(), "system": platform.system(), "torch": torch.__version__}
        looked_at = {"count": len(sizes), "mean_kb": round(statistics.mean(sizes) / 1000, 1)}
        result = {
            "machine": machine,
            "photos": looked_at,
            "workers": args.workers,
            **measure(photographs, args.workers, rivals),
        }
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(table(result))


if __name__ == "__main__":
    main()
