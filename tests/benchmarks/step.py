"""`python -m tests.benchmarks.step [--json]`: CPU milliseconds of one step by part, beside a loop of plain PyTorch.

One process of one thread on made-up images. Ours is the engine as `recipes/train.py` drives it, with the kernels of
`lars/exact/kernels.c` and without; the plain loop has pixels that are normalised already (as loaders deliver them),
standard batch norm and torch's fused SGD. All three take turns; a figure is the median over rounds of the thread's CPU
time, which a busy machine changes less than the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import DEMO

from lars import bind
from lars.engine.build import build_model, build_optimizer, start_engine
from lars.exact.portable import cpu
from lars.recipe import config
from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe
from lars.recipe.launched import Launched
from lars.recipe.model_file import import_model_file

LARGE = (
    "model.name=resnet50",
    "model.kwargs={}",
    "model.image_size=224",
    "augment.eval_resize=256",
    "global_batch=16",
    "bn_group=16",
)
# name: (recipe, its changes, samples of the one pass, rounds)
CASES: dict[str, tuple[str, tuple[str, ...], int, int]] = {
    "demo/alexnet": ("alexnet", ("global_batch=32",), 32, 40),
    "demo/resnet50": ("resnet50", ("global_batch=32", "bn_group=32"), 32, 40),
    "ResNet-50, 224 pixels": ("resnet50", LARGE, 16, 6),
}
WARM_UP = 2


class Clock:
    """{part: the CPU seconds of each round}."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, part: str, action: Callable[[], Any]) -> Any:
        started = time.thread_time()
        result = action()
        self.seconds.setdefault(part, []).append(time.thread_time() - started)
        return result

    def medians(self) -> dict[str, float]:
        ms = {part: 1000 * statistics.median(seconds[WARM_UP:]) for part, seconds in self.seconds.items()}
        return {part: round(value, 2) for part, value in {**ms, "step": sum(ms.values())}.items()}


def ours(recipe: Recipe, kernels: bool) -> Callable[[Clock, torch.Tensor, torch.Tensor], None]:
    """One step of `recipes/train.py`, without its loader, log and evaluation."""
    engine = start_engine(recipe, Launched.read(recipe))
    model, ghosts = build_model(recipe)
    engine.prepare(model, ghosts)
    optimizer = build_optimizer(recipe, model)
    plan = BatchPlan.of(recipe, 50_000, 1)
    engine.wrap(optimizer, plan)
    bind(engine.train_module, optimizer)
    engine.pin_arithmetic()
    sums, number = engine.sums(plan.passes, counts=3), 0
    if not kernels:
        sums.kernels = engine.kernels = None

    def step(clock: Clock, images: torch.Tensor, labels: torch.Tensor) -> None:
        nonlocal number
        number += 1
        pixels = clock("pixels", lambda: engine.pixels(images))
        logits = clock("forward", lambda: engine.train_module(pixels).float())
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        clock("backward", lambda: engine.backward(loss, 1))
        clock("add gradients", sums.add_gradients)
        numbers = clock("add statistics", lambda: torch.cat([loss.detach().double().view(1), engine.statistics()]))
        sums.add_floats(numbers)
        sums.add_counts([0, 0, 0])
        whole = clock("finish", sums.finish)
        clock("running averages", lambda: engine.update_statistics(whole.floats[1:]))
        clock("optimizer", lambda: engine.step(0.01, number))

    return step


def plain(recipe: Recipe) -> Callable[[Clock, torch.Tensor, torch.Tensor], None]:
    model = timm.create_model(recipe.model.name, num_classes=recipe.model.num_classes, **recipe.model.kwargs)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True)

    def step(clock: Clock, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        logits = clock("forward", lambda: model(pixels))
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        clock("backward", loss.backward)
        clock("optimizer", optimizer.step)

    return step


def measure(name: str) -> dict[str, dict[str, float]]:
    """{loop: {part: CPU ms}}, "step" for the sum of its parts."""
    file, changes, samples, rounds = CASES[name]
    recipe = config.load(DEMO / f"{file}.yaml", [*changes, "trackers=[]"])
    size = recipe.model.image_size
    images = torch.randint(0, 256, (samples, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    labels, pixels = torch.randint(0, recipe.model.num_classes, (samples,)), torch.randn(images.shape)
    loops = {"plain": plain(recipe), "ours": ours(recipe, True), "ours, no kernels": ours(recipe, False)}
    clocks = {who: Clock() for who in loops}
    for _ in range(WARM_UP + rounds):
        for who, step in loops.items():
            step(clocks[who], pixels if who == "plain" else images, labels)
    return {who: clock.medians() for who, clock in clocks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    import_model_file(DEMO)
    torch.set_num_threads(1)
    found = {"machine": {"cpu": cpu()[0], "torch": torch.__version__}, "steps": {n: measure(n) for n in CASES}}
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for name, loops in found["steps"].items():
        print(name)
        for who, parts in loops.items():
            print(f"  {who:17}" + "  ".join(f"{part} {ms:.1f}" for part, ms in parts.items()))


if __name__ == "__main__":
    main()
