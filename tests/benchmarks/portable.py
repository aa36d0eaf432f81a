"""`python -m tests.benchmarks.portable [--json]`: what `runtime.portable` costs, as a ratio of whole training steps.

Forward, backward, the order-free sum and LARS on random pixels, in one process with one thread; decoding is left out.
Fresh processes with and without the pinned instruction set take turns, and the turn changes every round, so that both
see the same machine. Counted is the CPU time of a process, not the clock: other work on the machine makes it wait,
which costs a process nothing. The smallest time is what the arithmetic needs; the median shows how far caches were
shared.
The two nets at ImageNet's size run in fp32: their recipes say bf16, for which oneDNN has no AVX2 code at all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lars.exact import portable

ROOT = Path(__file__).parents[2]
ROUNDS, WARM_UP, STEPS = 4, 1, 2
NETS = {  # recipe, what is smaller than in the recipe; the last two have the recipe's image size and few images a step
    "demo/alexnet": (),
    "demo/resnet50": (),
    "study/lars": (),
    "resnet50/lars-b32k-90ep": ("global_batch=16", "bn_group=8", "precision=fp32"),
    "alexnet/lars-b32k-100ep": ("global_batch=64", "bn_group=32", "precision=fp32"),
}


def steps(name: str, pinned: bool) -> list[float]:
    """CPU seconds of each measured step, in this process; torch must not be imported yet."""
    if pinned:
        portable.set_variables()
    import torch

    from lars.engine.build import build_model, build_optimizer, start_engine
    from lars.exact.reduction import OrderFreeSum
    from lars.recipe import config
    from lars.recipe.batch import BatchPlan
    from lars.recipe.launched import Launched
    from lars.recipe.model_file import import_model_file

    assert (portable.obstacle() is None) == pinned, portable.obstacle()
    file = ROOT / "recipes" / f"{name}.yaml"
    recipe = config.load(file, [*NETS[name], "trackers=[]"])
    import_model_file(file.parent)
    plan = BatchPlan.of(recipe, 2**20, 1)
    engine = start_engine(recipe, Launched.read(recipe, {}))
    model, ghosts = build_model(recipe)
    engine.prepare(model, ghosts)
    engine.wrap(build_optimizer(recipe, model), plan)
    engine.pin_arithmetic()
    floats = 1 + sum(2 * ghost.num_features for ghost in ghosts)
    sums = OrderFreeSum(list(model.named_parameters()), plan.passes, floats=floats, counts=1, device=engine.device)
    drawn, size = torch.Generator().manual_seed(0), recipe.model.image_size
    images = torch.randint(256, (plan.micro_batch, 3, size, size), dtype=torch.uint8, generator=drawn)
    labels = torch.randint(recipe.model.num_classes, (plan.micro_batch,), generator=drawn)
    times = []
    for step in range(WARM_UP + STEPS):
        started = time.process_time()
        for index in range(plan.passes):
            loss = engine.forward(images, labels, step, index)
            engine.backward(loss, plan.passes)
            sums.add_gradients()
            sums.add_floats(torch.cat([loss.detach().double().view(1), engine.statistics()]))
        sums.add_counts([0])
        found = sums.finish()
        engine.update_statistics(found.floats[1:] / (plan.global_batch // (plan.bn_group or 1)))
        assert engine.step(recipe.schedule.warmup_lr, 1) and torch.get_num_threads() == 1
        times.append(time.process_time() - started)
    return times[WARM_UP:]


def measure(name: str) -> dict:
    """{"pinned", "free": {"min", "median"} in CPU seconds a step, "ratio": of both, "load": before and after}."""
    ours = (*portable.VARIABLES, "OMP_NUM_THREADS")
    variables = {**{k: v for k, v in os.environ.items() if k not in ours}, "ACCELERATE_USE_CPU": "true"}
    times: dict[str, list[float]] = {"pinned": [], "free": []}
    load = [round(os.getloadavg()[0], 1)]
    for number in range(ROUNDS):
        for kind in sorted(times, reverse=number % 2 == 1):
            command = [sys.executable, "-m", "tests.benchmarks.portable", "--steps-of", name, "--kind", kind]
            done = subprocess.run(command, env=variables, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            times[kind] += json.loads(done.stdout.splitlines()[-1])
    found = {kind: {"min": min(t), "median": statistics.median(t)} for kind, t in times.items()}
    ratio = {how: round(found["pinned"][how] / found["free"][how], 3) for how in ("min", "median")}
    seconds = {kind: {how: round(value, 3) for how, value in row.items()} for kind, row in found.items()}
    return {"smaller": " ".join(NETS[name]), **seconds, "ratio": ratio, "load": [*load, round(os.getloadavg()[0], 1)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps-of", choices=NETS, help=argparse.SUPPRESS)  # a process of its own
    parser.add_argument("--kind", choices=("pinned", "free"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps_of:
        print(json.dumps(steps(args.steps_of, args.kind == "pinned")))
        return
    if reason := portable.excluded():
        sys.exit(f"error: nothing here can be portable: {reason}")
    machine = {"cpu": portable.cpu()[0], "cores": os.cpu_count(), "threads": 1, **portable.versions()}
    result = {"machine": machine, "rounds": ROUNDS, "steps": STEPS, "nets": {}}
    for name in NETS:
        row = result["nets"][name] = measure(name)
        ratios = f"{row['ratio']['min']:.3f} (minima), {row['ratio']['median']:.3f} (medians)"
        print(f"{name}: {ratios} of the CPU time without the pins, load {row['load']}", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
