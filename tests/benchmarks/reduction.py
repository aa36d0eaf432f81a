"""`python -m tests.benchmarks.reduction [--json]`: ways to a sum that does not depend on the number of processes.

Three ways over the gradient of ResNet-50 (25.6 million elements), V passes on W gloo processes of one thread each:

    float     passes added in float32, `all_reduce` of floats: other bits for every W
    integer   lars.reduction.OrderFreeSum
    tree      passes added in a binary tree, `all_to_all_single`, a tree over ranks, `all_gather_into_tensor`

Reports milliseconds a step without the forward and backward (median), bytes on the wire and of extra memory per
element, the one-step error against float64, and whether W = 1, 2, 4 gave one hash.

And how long only the exchange takes: integers as they are sent, floats, and ways that would send 6 bytes an element.

Then what the promise costs in a whole step, data included: `recipes/train.py` as it is, with
`runtime.deterministic=false`, and a loop of plain PyTorch (DDP, `no_sync` until the last pass, standard batch norm,
fused SGD) that reads the same batches; 8 passes of 32 images, at 2 and 4 processes, for a small and a large ResNet-50.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import DEMO, play

from lars.data.index import build_indexes
from lars.data.loader import training_batches
from lars.data.order import Order
from lars.exact.reduction import OrderFreeSum
from lars.recipe import config
from lars.recipe.batch import BatchPlan
from lars.run.reading import read_lines

PASSES, STEPS, WARM_UP = 8, 5, 1


def gradient(shapes: list[torch.Size], index: int) -> list[Tensor]:
    """The made-up gradient of pass `index`: layers of very different size, as real ones are."""
    generator = torch.Generator().manual_seed(index)
    return [torch.randn(s, generator=generator) * 10.0 ** -(2 + n % 5) for n, s in enumerate(shapes)]


class Float:
    wire_bytes, memory_bytes = 4, 4

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.total = torch.zeros(sum(p.numel() for p in parameters))

    def add(self) -> None:
        self.total += torch.cat([p.grad.reshape(-1) for p in self.parameters])

    def finish(self) -> Tensor:
        dist.all_reduce(self.total)
        mean = self.total / PASSES
        self.total.zero_()
        return mean


class Integer:
    wire_bytes, memory_bytes = 8, 12

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        named = [(str(n), p) for n, p in enumerate(parameters)]
        self.parameters = parameters
        self.sum = OrderFreeSum(named, PASSES, floats=0, counts=0, device=torch.device("cpu"))

    def add(self) -> None:
        self.sum.add_gradients()

    def finish(self) -> Tensor:
        self.sum.finish()
        return self.sum.flat


class Tree:
    """Needs W a power of two that leaves whole subtrees; holds log2(V / W) + 1 partial sums."""

    wire_bytes = 4

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters, self.world = parameters, dist.get_world_size()
        size = sum(p.numel() for p in parameters)
        self.padded = -(-size // self.world) * self.world
        self.stack: list[tuple[int, Tensor]] = []
        self.memory_bytes = 4 * ((PASSES // self.world).bit_length() + 2)

    def add(self) -> None:
        part, height = torch.zeros(self.padded), 0
        torch.cat([p.grad.reshape(-1) for p in self.parameters], out=part[: sum(p.numel() for p in self.parameters)])
        while self.stack and self.stack[-1][0] == height:
            part, height = self.stack.pop()[1].add_(part), height + 1
        self.stack.append((height, part))

    def finish(self) -> Tensor:
        mine = self.stack.pop()[1]
        shares = torch.empty_like(mine)
        dist.all_to_all_single(shares, mine)
        parts = list(shares.view(self.world, -1))
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2])]
        whole = torch.empty_like(mine)
        dist.all_gather_into_tensor(whole, parts[0] / PASSES)
        return whole[: sum(p.numel() for p in self.parameters)]


def _rank(rank: int, world: int, port: int, answer: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    parameters = [torch.nn.Parameter(p.detach()) for p in timm.create_model("resnet50").parameters()]
    shapes = [p.shape for p in parameters]
    mine = [gradient(shapes, i) for i in range(rank * PASSES // world, (rank + 1) * PASSES // world)]
    for way in (Float, Integer, Tree):
        total, times = way(parameters), []
        for _ in range(WARM_UP + STEPS):
            dist.barrier()
            started = time.perf_counter()
            for grads in mine:
                for p, g in zip(parameters, grads):
                    p.grad = g
                total.add()
            mean = total.finish()
            times.append(time.perf_counter() - started)
        if rank == 0:
            digest = hashlib.sha256(mean.numpy().tobytes()).hexdigest()
            exact = (
                sum(torch.cat([g.reshape(-1) for g in gradient(shapes, i)]).double() for i in range(PASSES)) / PASSES
            )
            error = float((mean - exact).norm() / exact.norm())
            median = 1000 * statistics.median(times[WARM_UP:])
            answer.put((way.__name__.lower(), median, error, digest, total.wire_bytes, total.memory_bytes))
    dist.destroy_process_group()


ELEMENTS = 25_557_032


def exchange(rank: int, world: int, store: str) -> dict[str, float]:
    """Milliseconds of each way to have the sum (or the mean) of all gradients on all of `world` processes.

    Args:
        store: where rank 0 listens, as in tcp://127.0.0.1:29600.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    size = -(-ELEMENTS // world) * world
    integers, floats = torch.ones(size, dtype=torch.int64), torch.ones(size)
    share, mean, others = integers[: size // world].clone(), floats[: size // world].clone(), torch.empty_like(integers)

    def scattered() -> None:
        dist.reduce_scatter_tensor(share, integers)
        dist.all_gather_into_tensor(floats, mean)

    def all_to_all() -> None:
        dist.all_to_all_single(others, integers)
        others.view(world, -1).sum(0)
        dist.all_gather_into_tensor(floats, mean)

    ways = {
        "all_reduce of int64": lambda: dist.all_reduce(integers),
        "all_reduce of float32": lambda: dist.all_reduce(floats),
        "reduce_scatter of int64, all_gather of float32": scattered,
        "all_to_all of int64, all_gather of float32": all_to_all,
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(WARM_UP + STEPS):
        for way, play_way in ways.items():
            dist.barrier()
            started = time.perf_counter()
            play_way()
            times[way].append(1000 * (time.perf_counter() - started))
    dist.destroy_process_group()
    return {way: round(statistics.median(ms[WARM_UP:]), 1) for way, ms in times.items()}


def _exchange(rank: int, world: int, store: str, answer: mp.SimpleQueue) -> None:
    found = exchange(rank, world, store)
    if rank == 0:
        answer.put(found)


def measure_exchange() -> dict[int, dict[str, float]]:
    """{processes: {way: ms}}."""
    table = {}
    for world in (2, 4):
        answer = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_exchange, (world, f"tcp://127.0.0.1:{29640 + world}", answer), nprocs=world)
        table[world] = answer.get()
    return table


STEP_KEYS = ("global_batch=256", "bn_group=32", "runtime.micro_batch=32", "epochs=4", "trackers=[]")
MODELS = {"small, 0.4 million weights": [8, 16, 32, 64], "large, 23.5 million weights": [64, 128, 256, 512]}


def _ddp_loop(rank: int, world: int, port: int, keys: tuple[str, ...], answer: mp.SimpleQueue) -> None:
    """A user's own loop on the same batches; the seconds of each step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    recipe = config.load(DEMO / "resnet50.yaml", list(keys))
    index, _ = build_indexes(recipe.data, 10)
    plan = BatchPlan.of(recipe, index.samples, world)
    slots = [range(i * 32, i * 32 + 32) for i in plan.local_passes(rank)]
    batches = training_batches(Order(index, 0, plan.global_batch, 32), index, recipe, slots, 0, WARM_UP + STEPS)
    model = DistributedDataParallel(
        timm.create_model("resnet50", num_classes=10, **recipe.model.kwargs), gradient_as_bucket_view=True
    )
    optimizer, times = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=True), []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        for part in slots:
            batch = next(batches)
            with nullcontext() if part is slots[-1] else model.no_sync():
                logits = model(batch.images.float().sub_(73.0).div_(90.0).contiguous())
                (F.cross_entropy(logits, batch.labels, label_smoothing=0.1) / len(slots)).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    batches.close()
    if rank == 0:
        answer.put(times[WARM_UP:])
    dist.destroy_process_group()


def measure_steps() -> dict:
    """{model: {processes: {"ms": {loop: ...}, "ratio": {loop: to DDP's own}}}}."""
    table: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for n, (name, channels) in enumerate(MODELS.items()):
            for world in (2, 4):
                keys, times = (*STEP_KEYS, f"model.kwargs.channels={channels}"), {}
                for loop, deterministic in (("deterministic", "true"), ("not deterministic", "false")):
                    run = Path(folder, f"{n}-{world}-{deterministic}")
                    more = (f"runtime.deterministic={deterministic}", f"max_steps={WARM_UP + STEPS}", f"run_dir={run}")
                    play(world, DEMO / "resnet50.yaml", *keys, *more, log=Path(folder, "log"))
                    times[loop] = [
                        256 / line["images_per_second"] for line in read_lines(run / "metrics.jsonl", "train")
                    ][WARM_UP:]
                answer = mp.get_context("spawn").SimpleQueue()
                mp.spawn(_ddp_loop, (world, 29610 + world + n, keys, answer), nprocs=world)
                times["DDP's own loop"] = answer.get()
                ms = {loop: round(1000 * statistics.median(seconds), 1) for loop, seconds in times.items()}
                ratio = {loop: round(median / ms["DDP's own loop"], 2) for loop, median in ms.items()}
                table.setdefault(name, {})[world] = {"ms": ms, "ratio": ratio}
    return table


def measure() -> dict:
    """{way: {"ms": {W: ...}, "ratio": {W: to float}, "error", "one_hash", ...}}."""
    rows: dict[str, dict] = {}
    for n, world in enumerate((1, 2, 4)):
        answer = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_rank, (world, 29600 + n, answer), nprocs=world)
        for _ in range(3):
            name, ms, error, digest, wire, memory = answer.get()
            row = rows.setdefault(
                name, {"ms": {}, "ratio": {}, "error": error, "hashes": set(), "wire_bytes": wire, "memory_bytes": {}}
            )
            row["ms"][world] = round(ms, 1)
            row["memory_bytes"][world] = memory
            row["hashes"].add(digest)
    for row in rows.values():
        row["ratio"] = {w: round(ms / rows["float"]["ms"][w], 2) for w, ms in row["ms"].items()}
        row["one_hash"] = len(row.pop("hashes")) == 1
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": torch.multiprocessing.cpu_count(),
        "torch": torch.__version__,
    }
    shared = {"elements": ELEMENTS, "passes": PASSES, "machine": machine}
    return {**shared, "ways": rows, "exchange": measure_exchange(), "steps": measure_steps()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure()
    if args.json:
        print(json.dumps(result, indent=1))
        return
    for name, row in result["ways"].items():
        print(f"{name:8} {row['ms']} ms, ratio {row['ratio']}, error {row['error']:.1e}, one hash: {row['one_hash']}")
    for world, ways in result["exchange"].items():
        print(f"{world} processes, the exchange alone: {ways} ms")
    for name, worlds in result["steps"].items():
        for world, row in worlds.items():
            print(f"{name}, {world} processes: {row['ms']} ms, ratio {row['ratio']}")


if __name__ == "__main__":
    main()
