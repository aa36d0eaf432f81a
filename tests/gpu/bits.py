"""The items of `make test-gpu` that are judged: the same bits, or the same numbers within a bound."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import DEMO, RANKS, ROOT, free_port, play, start_ranks, tiny_overrides
from distributed.parity import BATCH, RECIPE, bounds, differences, one_step
from gpu.played import engine_for, samples

from lars import LARS
from lars.exact.ghost_batchnorm import GhostBatchNorm2d
from lars.exact.reduction import OrderFreeSum
from lars.run.reading import read_result
from lars.run.sources import environment, versions

U = 2.0**-24  # float32's unit roundoff


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


def played(path: Path, *overrides: str) -> list[Tensor]:
    engine, plan = engine_for(path, *overrides)
    loss = engine.forward(*samples(engine, plan.micro_batch), step=0, pass_index=0)
    engine.backward(loss, 1)
    return [loss.detach().cpu(), *(p.grad.cpu() for p in engine.model.parameters())]


def same_bits(device: torch.device) -> dict:
    """A forward and backward twice, anew from the recipe; an operation without a deterministic kernel raises."""
    recipes, mixes = [DEMO / "alexnet.yaml", DEMO / "resnet50.yaml"], ("augment.mixup=0.2", "augment.cutmix=1.0")
    if device.type == "cuda":
        recipes += [ROOT / "recipes/resnet50/lars-b32k-90ep.yaml", ROOT / "recipes/alexnet/lars-b32k-100ep.yaml"]
    done = []
    for path in recipes:
        for precision in ("fp32", "bf16"):
            for channels_last in ("false", "true"):
                keys = (f"precision={precision}", f"runtime.channels_last={channels_last}")
                for more in ((), mixes[:1], mixes):
                    first, second = played(path, *keys, *more), played(path, *keys, *more)
                    what = f"{path.parent.name}/{path.stem}, {', '.join((*keys, *more))}"
                    assert all(map(torch.equal, first, second)), what
                    done.append(what)
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


def share_of_a_step(rank: int, processes: int, kind: str, port: int, file: str) -> None:
    """In a process of its own: its share of four passes of the demo's ResNet-50, added over gloo; saves the mean."""
    if processes > 1:
        at = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=at, rank=rank, world_size=processes)
    engine, plan = engine_for(DEMO / "resnet50.yaml")
    assert engine.device.type == kind, engine.device
    images, labels = samples(engine, 4 * plan.micro_batch)
    sums = OrderFreeSum(list(engine.model.named_parameters()), 4, 1, 1, engine.device)
    for number in range(rank * 4 // processes, (rank + 1) * 4 // processes):
        part = slice(number * plan.micro_batch, (number + 1) * plan.micro_batch)
        engine.backward(engine.forward(images[part], labels[part], step=0, pass_index=number), 1)
        sums.add_gradients()
    sums.finish()
    if rank == 0:
        torch.save([p.grad.cpu() for p in engine.model.parameters()], file)
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def shared_gpu(device: torch.device) -> dict:
    """2 and 4 processes on one GPU, which NCCL refuses: over gloo the mean gradient has the bits of one process."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, str(processes))) for processes in (1, 2, 4)]
        for processes, file in zip((1, 2, 4), files):
            port = free_port()
            ranks = [
                RANKS.Process(target=share_of_a_step, args=(rank, processes, device.type, port, file))
                for rank in range(processes)
            ]
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join(300)
            assert [rank.exitcode for rank in ranks] == [0] * processes, [rank.exitcode for rank in ranks]
        alone, *others = (torch.load(file, weights_only=True) for file in files)
    for other in others:
        assert all(map(torch.equal, alone, other)), "other bits than one process"
    return {"processes": [1, 2, 4]}


def engines(device: torch.device) -> dict:
    """One step on every engine from the same checkpoint, within the bound that tests/distributed/parity.py derives."""
    names = ["ddp", "fsdp2"]
    if importlib.util.find_spec("deepspeed"):
        names += ["zero1", "zero2", "zero3"]
    processes = torch.cuda.device_count() if device.type == "cuda" else 2
    with tempfile.TemporaryDirectory() as temporary:
        folder, found = Path(temporary), {}
        (folder / "data").mkdir()
        tiny = (*tiny_overrides(folder / "data"), *BATCH)
        more = ("max_steps=4", "checkpoint.every_steps=1", "checkpoint.keep=9", f"run_dir={folder / 'control'}")
        play(1, RECIPE, *tiny, *more, log=folder / "log")
        allowed = bounds(folder / "control", 3, tiny)
        for name in names:
            ours, _ = one_step(name, processes, folder / "control", 3, tiny, folder / "one", first=None)
            off = differences(ours, folder / "control", 3)
            found[name] = max(off[tensor] / allowed[tensor] for tensor in off)
            assert found[name] <= 1, f"{name}: {found[name]:.2f} of the bound"
    without = {} if len(names) > 2 else {"why": "without DeepSpeed, which is not installed"}
    return {"processes": processes, "of_bound": found, **without}
