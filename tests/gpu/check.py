"""`make test-gpu [DEVICE=cpu] [PART=1]`: does this machine's GPU keep every promise? One line for each item.

What has passed stands in results/<device>.json and is not run again with the same sources and software. On the CPU the
items are the same and small: that tests this script and says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import DEMO, ROOT, play, start_ranks, tiny_overrides

from lars import LARS
from lars.engine.base import Engine
from lars.engine.build import build_model, build_optimizer, start_engine
from lars.engine.memory import activation_bytes, state_bytes
from lars.exact.ghost_batchnorm import GhostBatchNorm2d, convert
from lars.exact.reduction import OrderFreeSum
from lars.recipe import config
from lars.recipe.batch import BatchPlan
from lars.recipe.launched import Launched
from lars.recipe.model_file import import_model_file
from lars.run.reading import read_result
from lars.run.sources import environment, source_sha256, sources, versions

RESULTS = Path(__file__).parent / "results"
U = 2.0**-24  # float32's unit roundoff


class Skipped(Exception):
    """This machine lacks what the item needs."""


def software(device: torch.device) -> dict:
    """Versions, and what of the machine decides bits."""
    return {"versions": versions(), "environment": environment(device)}


def summed(gradients: list[list[Tensor | None]], device: torch.device) -> tuple[list[Tensor | None], list[str]]:
    layouts = (torch.channels_last, torch.contiguous_format, torch.contiguous_format)
    shapes = ((64, 32, 3, 3), (1000, 64), (7,))
    ps = [nn.Parameter(torch.zeros(s, device=device).contiguous(memory_format=m)) for s, m in zip(shapes, layouts)]
    total = OrderFreeSum([(str(i), p) for i, p in enumerate(ps)], len(gradients), 2, 1, device)
    for one in gradients:
        for p, g in zip(ps, one):
            p.grad = None if g is None else torch.empty_like(p).copy_(g)
        total.add_gradients()
        total.add_floats(torch.tensor([1e-9, -7.3], device=device))
        total.add_counts([2**64 - 1])
    sums = total.finish()
    return [None if p.grad is None else p.grad.cpu() for p in ps] + [sums.floats], sums.bad_gradients


def order_free_sum(device: torch.device) -> dict:
    """The same bits as on the CPU, and the same gradients refused."""
    torch.manual_seed(0)
    good = [[torch.randn(64, 32, 3, 3) * 10.0**-k, torch.randn(1000, 64), None] for k in range(6)]
    for ours, theirs in zip(summed(good, device)[0], summed(good, torch.device("cpu"))[0]):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), "other bits than on the CPU"
    for bad in (math.nan, math.inf, -math.inf, 2.0**14, -1e30):
        assert summed([*good, [good[0][0], torch.full((1000, 64), bad), None]], device)[1] == ["1"], bad
    return {"passes": len(good)}


def optimizer_and_norms(device: torch.device) -> dict:
    """LARS and batch-norm groups against the CPU; a sum of n products is off by sqrt(n) u in each evaluation."""
    torch.manual_seed(0)
    w, x = torch.randn(256, 512), torch.randn(32, 8, 14, 14) * 3 + 1
    stepped, normed = [], []
    for where in (torch.device("cpu"), device):
        p = nn.Parameter(w.clone().to(where))
        p.grad = torch.full_like(p, 0.01)
        LARS([p], lr=8.0, weight_decay=1e-4).step()
        stepped.append(p.detach().cpu().double() - w.double())
        ghost = GhostBatchNorm2d(nn.BatchNorm2d(8), 8).to(where).train()
        normed.append((ghost(x.to(where)).detach().cpu(), ghost.group_sums.cpu()))
    off = float((stepped[0] - stepped[1]).norm() / stepped[0].norm())
    moved = float(w.double().norm() / stepped[0].norm())
    assert off <= 4 * U * math.sqrt(w.numel()) + 2 * U * moved, off  # two norms in each ratio; the weight is rounded
    bound = 8 * U * math.sqrt(8 * 14 * 14) * float(x.abs().max()) ** 2
    assert all(float((a - b).abs().max()) <= bound for a, b in zip(*normed)), "batch-norm groups"
    return {"LARS": off}


def engine_for(path: Path, *overrides: str) -> tuple[Engine, BatchPlan]:
    """The engine that train.py would build for one process, with its model and optimizer."""
    import_model_file(path.parent)
    recipe = config.load(path, ["runtime.portable=false", "trackers=[]", *overrides])
    engine = start_engine(recipe, Launched("plain", 1))
    model, ghosts = build_model(recipe)
    plan = BatchPlan.of(recipe, 1_281_167, 1)  # as many as the largest of these recipes wants
    engine.prepare(model, ghosts)
    engine.wrap(build_optimizer(recipe, model), plan)
    engine.pin_arithmetic()
    return engine, plan


def samples(engine: Engine, count: int) -> tuple[Tensor, Tensor]:
    """Made-up pixels and labels where the loader leaves them: in memory that the GPU can read."""
    size, draw = engine.recipe.model.image_size, torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=draw)
    labels = torch.randint(engine.recipe.model.num_classes, (count,), generator=draw)
    if engine.device.type == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()
    return images.permute(0, 3, 1, 2), labels


def played(path: Path, *overrides: str) -> list[Tensor]:
    engine, plan = engine_for(path, *overrides)
    loss = engine.forward(*samples(engine, plan.micro_batch), step=0, pass_index=0)
    engine.backward(loss, 1)
    return [loss.detach().cpu(), *(p.grad.cpu() for p in engine.model.parameters())]


def same_bits(device: torch.device) -> dict:
    """A forward and backward twice, anew from the recipe; an operation without a deterministic kernel raises."""
    recipes = [DEMO / "alexnet.yaml", DEMO / "resnet50.yaml"]
    if device.type == "cuda":
        recipes += [ROOT / "recipes/resnet50/lars-b32k-90ep.yaml", ROOT / "recipes/alexnet/lars-b32k-100ep.yaml"]
    done = []
    for path in recipes:
        for precision in ("fp32", "bf16"):
            for channels_last in ("false", "true"):
                keys = (f"precision={precision}", f"runtime.channels_last={channels_last}")
                first, second = played(path, *keys), played(path, *keys)
                assert all(map(torch.equal, first, second)), f"{path.parent.name}/{path.stem} {keys}"
                done.append(f"{path.parent.name}/{path.stem}, {', '.join(keys)}")
    return {"equal": done}


def one_hash(device: torch.device) -> dict:
    """Whole runs of train.py with their loaders: one process, several, and one killed and resumed."""
    with tempfile.TemporaryDirectory() as folder:
        (data := Path(folder, "data")).mkdir()
        keys = (*tiny_overrides(data), "max_steps=6", "checkpoint.every_steps=1")
        most = torch.cuda.device_count() if device.type == "cuda" else 2
        hashes = {}
        for processes in (w for w in (1, 2, 4, 8) if w <= most):
            run = Path(folder, str(processes))
            play(processes, DEMO / "resnet50.yaml", *keys, f"run_dir={run}", log=Path(folder, "log"))
            hashes[f"{processes} processes"] = read_result(run)["weights_sha256"]
        run = Path(folder, "killed")
        more = (*keys, f"run_dir={run}")
        ranks = start_ranks(1, DEMO / "resnet50.yaml", *more, log=Path(folder, "log"))
        while not (run / "checkpoints/step-00000002").exists() and ranks.processes[0].is_alive():
            time.sleep(0.01)
        if ranks.processes[0].is_alive():
            os.kill(ranks.processes[0].pid, signal.SIGKILL)
        assert ranks.wait() == [-signal.SIGKILL], ranks.output
        play(1, DEMO / "resnet50.yaml", *more, log=Path(folder, "log"))
        hashes["killed after step 2, resumed"] = read_result(run)["weights_sha256"]
    assert len(set(hashes.values())) == 1, hashes
    return hashes


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
    """Images per second: the median of five after two that warm up."""
    times = []
    for _ in range(7):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return round(images / sorted(times[2:])[2], 1)


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
    return {"verdict": "measured", "images_per_second": found}


PARTS: dict[int, tuple[Callable[[torch.device], dict], ...]] = {
    1: (software, order_free_sum, optimizer_and_norms),
    2: (same_bits,),
    3: (one_hash,),
    4: (no_waiting, memory, speed),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--part", type=int, choices=PARTS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no GPU here: DEVICE=cpu tests this script on the processor", file=sys.stderr)
        return 2
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update(HF_HUB_OFFLINE="1")
    device = torch.device(args.device)
    name = torch.cuda.get_device_name().replace(" ", "-") if args.device == "cuda" else "cpu"
    file = RESULTS / f"{name}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    made = {"sources": source_sha256(sources(DEMO / "resnet50.yaml")), **environment(device)}
    for part in [args.part] if args.part else PARTS:
        for item in PARTS[part]:
            row = found.get(item.__name__, {})
            kept = row.get("verdict") in ("PASS", "measured") and row.get("made") == made
            if not kept:
                started = time.perf_counter()
                try:
                    row = {"verdict": "PASS", **item(device)}
                except Skipped as reason:
                    row = {"verdict": "skipped", "why": str(reason)}
                except Exception as error:  # whatever goes wrong in an item, the others still run
                    traceback.print_exc()
                    row = {"verdict": "FAIL", "why": f"{type(error).__name__}: {error}"}
                found[item.__name__] = row | {"made": made, "seconds": round(time.perf_counter() - started, 1)}
                file.write_text(json.dumps(found, indent=1) + "\n")
            row = found[item.__name__]
            print(
                f"{part} {item.__name__:20s} {row['verdict']:8s} {row['seconds']:6.1f} s  {row.get('why', '')}"
                f"{' (done before)' if kept else ''}",
                flush=True,
            )
    return int(any(row["verdict"] == "FAIL" for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
