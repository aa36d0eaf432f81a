"""`python -m tests.benchmarks.optimizer_step [--json]`: what a LARS step costs, as ratios to torch's fused SGD.

fp32 parameters of ResNet-50 and AlexNet, momentum 0.9, on all cores (or the GPU). Rivals take turns in every round, so
that all see the same machine; the figure is the median over rounds after warm-up.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import pytorch_optimizer
import timm
import torch
from timm.optim import Lars

import lars
import recipes.alexnet.model  # noqa: F401  registers alexnet
from lars.exact.portable import cpu

ROUNDS, WARM_UP = 41, 3


def rivals(shapes: list[torch.Size], device: torch.device) -> dict[str, Callable[[], None]]:
    """{name: one optimizer step}, each over parameters of its own."""

    def parameters() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.randn(s, device=device) * 0.01) for s in shapes]
        for p in made:
            p.grad = torch.randn_like(p) * 1e-3
        return made

    common = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
    single = Lars(parameters(), foreach=False, **common)
    return {
        "torch SGD fused": torch.optim.SGD(parameters(), fused=True, **common).step,
        "torch SGD foreach": torch.optim.SGD(parameters(), foreach=True, **common).step,
        "lars.LARS": lars.LARS(parameters(), **common).step,
        "timm Lars foreach": Lars(parameters(), **common).step,
        "timm Lars single": single.step,
        "timm Lars compiled": torch.compile(Lars(parameters(), **common).step),
        "pytorch_optimizer LARS": pytorch_optimizer.LARS(parameters(), **common).step,
    }


def measure(model: str, device: torch.device) -> dict[str, dict[str, float]]:
    """{rival: {"ms", "ratio"}} for the parameters of one timm model."""
    steps = rivals([p.shape for p in timm.create_model(model).parameters()], device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARM_UP + ROUNDS):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - started))
    medians = {name: statistics.median(t[WARM_UP:]) for name, t in times.items()}
    base = medians["torch SGD fused"]
    return {name: {"ms": round(ms, 2), "ratio": round(ms / base, 2)} for name, ms in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{cpu()[0]}, {torch.backends.cpu.get_cpu_capability()}"
    )
    machine = {
        "device": name,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "torch": torch.__version__,
    }
    result = {"machine": machine, "models": {model: measure(model, device) for model in ("resnet50", "alexnet")}}
    if args.json:
        print(json.dumps(result, indent=1))
        return
    for model, rows in result["models"].items():
        for rival, row in rows.items():
            print(f"{model:9} {rival:24} {row['ms']:8.2f} ms  {row['ratio']:5.2f} x")


if __name__ == "__main__":
    main()
