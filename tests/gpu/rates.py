"""The items of `make test-gpu` that only a GPU can show: waits, memory and rates."""

from __future__ import annotations

import copy
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
import torch.nn.functional as F
from conftest import DEMO, ROOT
from gpu.played import Skipped, engine_for, samples
from PIL import Image
from torch import Tensor, nn

from lars.data.index import build_indexes
from lars.data.loader import training_batches
from lars.data.order import Order
from lars.engine.base import Engine
from lars.engine.build import build_model
from lars.engine.memory import activation_bytes, state_bytes
from lars.exact.ghost_batchnorm import convert


def no_waiting(device: torch.device) -> dict:
    """A pass, under the mode that makes every wait for the device an error."""
    if device.type != "cuda":
        raise Skipped("a CPU waits for nobody")
    engine, plan = engine_for(DEMO / "resnet50.yaml")
    batch, sums = samples(engine, plan.micro_batch), engine.sums(plan.passes, counts=3)
    for number in range(2):  # the first pass may set things up
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            engine.backward(engine.forward(*batch, step=0, pass_index=number), 1)
            sums.add_gradients()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {}


def memory(device: torch.device) -> dict:
    """The most that a pass took against the prediction; cuDNN's workspaces are not in it, so this one only tells."""
    if device.type != "cuda":
        raise Skipped("torch counts memory on GPUs alone")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine, plan = engine_for(DEMO / "resnet50.yaml", "runtime.micro_batch=256", "global_batch=1024")
    sums = engine.sums(plan.passes, counts=3)
    engine.backward(engine.forward(*samples(engine, plan.micro_batch), step=0, pass_index=0), 1)
    sums.add_gradients()
    plain, size = build_model(engine.recipe)[0], engine.recipe.model.image_size
    state = state_bytes(engine.recipe, 1) * sum(p.numel() for p in plain.parameters())
    predicted = state + activation_bytes(plain, (plan.micro_batch, 3, size, size))
    return {"verdict": "measured", "bytes": torch.cuda.max_memory_allocated() - before, "predicted": predicted}


def rate(work: Callable[[], None], images: int, device: torch.device) -> float:
    """Images per second: the median of five after two that warm up; on a CPU one after one."""
    times, warm = [], 2 if device.type == "cuda" else 1
    for _ in range(warm + 5 if device.type == "cuda" else 2):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return round(images / statistics.median(times[warm:]), 1)


def speed(device: torch.device) -> dict:
    """Forward and backward of ResNet-50 with data in memory, against a plain timm loop in the same run."""
    big = device.type == "cuda"
    count, size, kwargs = (256, 224, {}) if big else (32, 32, {"channels": [8, 16, 32, 64]})
    images, labels = torch.randn(count, 3, size, size, device=device), torch.zeros(count, dtype=torch.long).to(device)
    found: dict[str, float] = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        base = timm.create_model("resnet50", **kwargs).to(device, memory_format=layout).train()
        x = images.contiguous(memory_format=layout)
        for groups in (None, 1, 4, 16):
            for deterministic in (False, True):
                model = copy.deepcopy(base)
                if groups:
                    convert(model, count // groups)
                torch.use_deterministic_algorithms(deterministic)
                torch.backends.cudnn.benchmark = not deterministic

                def work(model: nn.Module = model, x: Tensor = x) -> None:
                    with torch.autocast(device.type, torch.bfloat16):
                        logits = model(x)
                    F.cross_entropy(logits.float(), labels).backward()

                what = f"{groups} groups" if groups else "plain timm"
                name = f"{what}, {'NHWC' if layout is torch.channels_last else 'NCHW'}"
                found[name + ", deterministic" * deterministic] = rate(work, count, device)
    torch.use_deterministic_algorithms(False)
    for compiled in ("false", "true"):
        keys = ("precision=bf16", "runtime.channels_last=true", f"runtime.compile={compiled}")
        engine, plan = engine_for(*of_224(device), *keys)
        batch = samples(engine, plan.micro_batch)

        def work(engine: Engine = engine, batch: tuple = batch) -> None:
            engine.backward(engine.forward(*batch, step=0, pass_index=0), 1)

        found[f"this project's engine, compile={compiled}"] = rate(work, plan.micro_batch, device)
    return {"verdict": "measured", "images_per_second": found}


def of_224(device: torch.device) -> tuple:
    """ResNet-50 on ImageNet with passes of 256; a CPU takes the demo's."""
    if device.type != "cuda":
        return (DEMO / "resnet50.yaml",)
    return ROOT / "recipes/resnet50/lars-b32k-90ep.yaml", "runtime.micro_batch=256"


def pictures(folder: Path, images: int) -> None:
    """A data set of made-up JPEGs of 500 x 375, as heavy to decode as photographs: smooth colours under grain."""
    from datasets import ClassLabel, Features
    from datasets import Image as ImageColumn

    draw, rows = np.random.default_rng(0), []
    for _ in range(min(images, 200)):
        smooth = Image.fromarray(draw.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.BICUBIC)
        grain = np.asarray(smooth, np.float32) + draw.normal(0, 8, (375, 500, 1))
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(stream := io.BytesIO(), "JPEG", quality=90)
        rows.append({"bytes": stream.getvalue(), "path": None})
    schema = Features({"image": ImageColumn(), "label": ClassLabel(num_classes=10)}).arrow_schema
    for split, count in (("train", images), ("validation", 100)):
        columns = [[rows[n % len(rows)] for n in range(count)], [n % 10 for n in range(count)]]
        file = folder / f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.table(columns, schema=schema), file, row_group_size=100)


def from_parquet(device: torch.device) -> dict:
    """Images/s of forward and backward when the loader decodes them from Parquet, and of the loader alone."""
    steps = 3 if device.type == "cpu" else 12
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        size = {"cpu": 64, "cuda": 256}[device.type]
        pictures(Path(temporary), 4 * size)
        path, *keys = of_224(device)
        keys += [f"data.path={temporary}", f"global_batch={size}", f"bn_group={size}", f"runtime.micro_batch={size}"]
        engine, plan = engine_for(path, *keys, "precision=bf16", "runtime.channels_last=true")
        recipe = engine.recipe
        index = build_indexes(recipe.data, recipe.model.num_classes)[0]
        order = Order(index, recipe.seed, plan.global_batch, plan.bn_group)
        for name, trains in (("loader alone", False), ("trained from Parquet", True)):
            batches = training_batches(order, index, recipe, [range(size)], 0, steps + 2, device)
            try:
                for step in range(steps + 2):
                    if step == 2:  # two warm up
                        started = time.perf_counter()
                    batch = batches.take(size)
                    if trains:
                        engine.backward(engine.forward(batch.images, batch.labels, step=step, pass_index=0), 1)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                found[name] = round(steps * size / (time.perf_counter() - started), 1)
            finally:
                batches.close()
    return {"verdict": "measured", "images_per_second": found, "cores": os.cpu_count()}
