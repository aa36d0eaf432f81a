"""`make parity`: is one step the same on every engine?

Writes parity.json and parity.png beside itself and the table of docs/engines.md; with ATEN_CPU_CAPABILITY=avx2 (and
ONEDNN_MAX_CPU_ISA=AVX2), as another CPU would compute it, parity-avx2.json alone.

A control (one process, plain, bitwise) trains a small recipe and keeps every checkpoint. From its state after an early,
a middle and a late step every engine takes one step with 1, 2 and 3 processes, through `recipes/train.py` and its
launch file; that step is compared with the control's own. The first rows are timm's LARS on ZeRO, against timm's LARS
in one process.

The bound is of arithmetic, for each tensor (u = 2^-24, float32's unit roundoff; Higham and Mary 2019 for the square
root): a gradient element is a sum of k products, and each of the two evaluations is off by u sqrt(k) of it; the trust
ratio repeats that error, so what the step adds to the velocity, a = v' - m v, is off by 2 * 2u sqrt(k) |a|. Weights and
velocity are rounded when they are stored, in both evaluations: 2u |w| and 4u |v'|. All relative to the step |w' - w|.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import matplotlib
import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import DEMO, ROOT, play, tiny_overrides

from lars.engine.build import build_model
from lars.recipe import config
from lars.run.sources import commit

RECIPE = DEMO / "resnet50.yaml"
STEPS = 60
POINTS = {"early": 1, "middle": STEPS // 2, "late": STEPS - 1}
PROCESSES = (1, 2, 3)
# Groups of 32: with 4 samples at 1 x 1 pixel a dead channel has no variance, and one ulp of a weight moves the first
# step by 4 %.
BATCH = ("global_batch=192", "bn_group=32", "runtime.micro_batch=32", "epochs=16")
ENGINES = ("plain", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")
BUILT = {  # what the launch file promises: engine, optimizer inside it, type of a parameter
    "plain": ("ResNet", "LARS", "Parameter"),
    "ddp": ("DistributedDataParallel", "LARS", "Parameter"),
    "zero0": ("DeepSpeedEngine, stage 0", "LARS", "Parameter"),
    "zero1": ("DeepSpeedEngine, stage 1", "DeepSpeedZeroOptimizer", "Parameter"),
    "zero2": ("DeepSpeedEngine, stage 2", "DeepSpeedZeroOptimizer", "Parameter"),
    "zero3": ("DeepSpeedEngine, stage 3", "DeepSpeedZeroOptimizer_Stage3", "Parameter"),
    "fsdp2": ("FSDPResNet", "LARS", "DTensor"),
}
TABLE = ("<!-- parity: written by `make parity` -->\n", "<!-- end of parity -->\n")


def observe() -> None:
    """In each rank: print what was built, and the collectives inside the optimizer's step, as JSON lines."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.debug import CommDebugMode

    import lars
    from recipes import train

    bind, step = train.bind, lars.LARS.step

    def tell(model: torch.nn.Module, optimizer: lars.LARS) -> None:
        bind(model, optimizer)
        stage = f", stage {model.zero_optimization_stage()}" if hasattr(model, "zero_optimization_stage") else ""
        inside = getattr(model, "optimizer", optimizer)
        p = next(model.parameters())
        built = (
            type(model).__name__ + stage,
            type(inside).__name__,
            "DTensor" if isinstance(p, DTensor) else "Parameter",
        )
        say({"built": built})

    def counted(self: lars.LARS, closure: None = None) -> None:
        with CommDebugMode() as mode:
            step(self, closure)
        say({"collectives": mode.get_total_counts()})

    def say(line: dict) -> None:
        os.write(1, f"\n{json.dumps(line)}\n".encode())  # in one piece: the ranks share a file

    train.bind, lars.LARS.step = tell, counted


def take_timm() -> None:
    """In each rank: timm's LARS or LAMB as its users have it, unbound, and without momentum from a checkpoint."""
    import timm.optim

    from lars.engine.base import Engine
    from lars.engine.deepspeed import DeepSpeed
    from lars.engine.evaluate import Evaluation
    from recipes import train

    def build(recipe: config.Recipe, model: torch.nn.Module) -> torch.optim.Optimizer:
        keys = recipe.optimizer
        own = {"momentum": keys.momentum} if keys.name == "lars" else {"max_grad_norm": None}
        return timm.optim.create_optimizer_v2(model, keys.name, lr=keys.lr, weight_decay=keys.weight_decay, **own)

    train.build_optimizer, train.bind, train.group_table = build, lambda *_: None, lambda *_: ""
    scores = {"loss": 0.0, "top1": 0.0, "top5": 0.0, "images": 0}
    train.evaluate = lambda *_: Evaluation(scores)  # its weights may be past evaluating
    for kind in (Engine, DeepSpeed):
        kind.momentum, kind.load_momentum = lambda self: {}, lambda self, momentum: None
        kind.trust_ratios = lambda self: {}


def nudge() -> None:
    """In each rank: one weight of the first layer starts one unit in the last place higher."""
    from recipes import train

    build = train.build_model

    def moved(recipe: config.Recipe) -> tuple:
        model, ghosts = build(recipe)
        w = next(model.parameters()).data.view(-1)
        w[0] = torch.nextafter(w[0], torch.tensor(math.inf))
        return model, ghosts

    train.build_model = moved


def engine_keys(engine: str) -> tuple[tuple[str, ...], str]:
    """(overrides, launch file) that make train.py build an engine."""
    return ("runtime.deterministic=false",) * (engine == "ddp"), "" if engine in ("plain", "ddp") else engine


def weights_after(run: Path, step: int) -> dict[str, Tensor]:
    tensors = load_file(run / f"checkpoints/step-{step:08d}/model.safetensors")
    return {name: t.double() for name, t in tensors.items() if t.is_floating_point() and "running_" not in name}


def one_step(
    engine: str, processes: int, control: Path, step: int, tiny: tuple[str, ...], run: Path, first=observe
) -> tuple[dict[str, Tensor], str]:
    """(the weights, what the ranks printed) of one step on another engine, from the control's state after `step`."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(control / f"checkpoints/step-{step:08d}", run / f"checkpoints/step-{step:08d}")
    keys, where = engine_keys(engine)
    printed = play(
        processes,
        RECIPE,
        *tiny,
        *keys,
        f"max_steps={step + 1}",
        f"run_dir={run}",
        log=run.with_suffix(".log"),
        where=where,
        first=first,
    )
    return weights_after(run, step + 1), printed


def roundings(tiny: tuple[str, ...]) -> int:
    """k: products in the longest sum of a gradient element, plus those of the sums that it passes on its way back."""
    recipe = config.load(RECIPE, list(tiny))
    model, _ = build_model(recipe)
    positions, fans = [1], []

    def look(layer: torch.nn.Conv2d, inputs: tuple, output: Tensor) -> None:
        positions.append(output.shape[2] * output.shape[3])
        fans.append(layer.weight[:, 0].numel())

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(look)
    model.eval()(torch.zeros(1, 3, recipe.model.image_size, recipe.model.image_size))
    return recipe.global_batch * max(positions) + sum(fans)


def bounds(control: Path, step: int, tiny: tuple[str, ...]) -> dict[str, float]:
    """For each tensor the largest difference, relative to the step, that rounding explains (see this file's top)."""
    u, k, momentum = 2.0**-24, roundings(tiny), config.load(RECIPE, list(tiny)).optimizer.momentum
    before, after = weights_after(control, step), weights_after(control, step + 1)
    old, new = (load_file(control / f"checkpoints/step-{s:08d}/momentum.safetensors") for s in (step, step + 1))
    found = {}
    for name, w in after.items():
        added = (new[name].double() - momentum * old[name].double()).norm()
        error = 4 * u * math.sqrt(k) * added + 2 * u * w.norm() + 4 * u * new[name].double().norm()
        found[name] = float(error / (w - before[name]).norm())
    return found


def differences(ours: dict[str, Tensor], control: Path, step: int) -> dict[str, float]:
    """For each tensor |ours - control's| after `step` + 1, relative to the control's step."""
    before, after = weights_after(control, step), weights_after(control, step + 1)
    return {name: float((ours[name] - w).norm() / (w - before[name]).norm()) for name, w in after.items()}


def told(printed: str, key: str) -> list:
    """What the ranks wrote under `key`."""
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"')]
    return [line[key] for line in lines if key in line]


def measure(engine: str, processes: int, control: Path, tiny: tuple[str, ...], folder: Path) -> dict:
    """One row of ours."""
    row = {"engine": engine, "optimizer": "lars.LARS", "processes": processes, "difference": {}, "of_bound": {}}
    passed = True
    for point, step in POINTS.items():
        ours, printed = one_step(engine, processes, control, step, tiny, folder / "one")
        found, allowed = differences(ours, control, step), bounds(control, step, tiny)
        row["difference"][point] = max(found.values())
        row["of_bound"][point] = max(found[name] / allowed[name] for name in found)
        row["built"] = told(printed, "built")[0]
        row["collectives"] = sum(told(printed, "collectives")) / processes
        passed &= row["of_bound"][point] <= 1 and tuple(row["built"]) == BUILT[engine]
    return row | {"verdict": "PASS" if passed else "FAIL"}


def measure_timm(engine: str, processes: int, control: Path, tiny: tuple[str, ...], folder: Path) -> dict:
    """One row of the disease: timm's LARS on ZeRO against timm's LARS in one process, from the same weights."""
    row = {"engine": engine, "optimizer": "timm Lars", "processes": processes, "difference": {}}
    allowed = max(max(bounds(control, step, tiny).values()) for step in POINTS.values())  # ours of the same gradients
    for point, step in POINTS.items():
        alone, _ = one_step("plain", 1, control, step, tiny, folder / "alone", first=take_timm)
        sharded, _ = one_step(engine, processes, control, step, tiny, folder / "sharded", first=take_timm)
        before = weights_after(control, step)
        worst = max(
            (float((sharded[n] - w).norm() / (w - before[n]).norm()) for n, w in alone.items()),
            key=lambda x: (x != x, x),
        )
        row["difference"][point] = worst if math.isfinite(worst) else None
    exact = all(difference is not None and difference <= allowed for difference in row["difference"].values())
    return row | {"verdict": "PASS" if exact else "FAIL"}


def drift(control: Path, tiny: tuple[str, ...], folder: Path) -> dict[str, list[float]]:
    """{run: distance from the control relative to the control's way from the start, after every step}."""
    start = {n: p.detach().double() for n, p in build_model(config.load(RECIPE, list(tiny)))[0].named_parameters()}
    found = {}
    for name in (*(e for e in ENGINES if e != "plain"), "one ulp in one weight"):
        run = folder / name.replace(" ", "-")
        keys, where = engine_keys(name) if name in ENGINES else ((), "")
        more = (f"max_steps={STEPS}", "checkpoint.every_steps=1", "checkpoint.keep=999", f"run_dir={run}")
        play(2, RECIPE, *tiny, *keys, *more, log=folder / "log", where=where, first=None if name in ENGINES else nudge)
        found[name] = []
        for step in range(1, STEPS + 1):
            ours, theirs = weights_after(run, step), weights_after(control, step)
            away, way = (
                math.sqrt(sum(float((a[n] - b[n]).square().sum()) for n in b))
                for a, b in ((ours, theirs), (theirs, start))
            )
            found[name].append(away / way)
    return found


def plot(drifts: dict[str, list[float]], file: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for name, values in drifts.items():
        thick = {"color": "black", "linewidth": 2.5, "zorder": 0} if name not in ENGINES else {"linewidth": 1.2}
        axes.semilogy(range(1, len(values) + 1), values, label=name, **thick)
    axes.set(
        xlabel="step", ylabel="distance from the control / its way so far", title="Rounding grows; no engine adds to it"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(file, dpi=110)


def table(rows: list[dict]) -> str:
    """The table of docs/engines.md: a line for each engine and optimizer, with the process counts in its cells."""
    lines = [
        "| engine | optimizer | processes | early | middle | late | collectives | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (engine, optimizer), some in groupby(rows, key=lambda row: (row["engine"], row["optimizer"])):
        some = list(some)
        differences = [[row["difference"][point] for row in some] for point in POINTS]
        exact = [
            ", ".join(
                "NaN" if d is None else f"{d:.1e}".replace("e-0", "e-") if 0 < d < 1 else f"{d:.2g}" for d in point
            )
            for point in differences
        ]
        said = {
            key: dict.fromkeys(f"{row[key]:g}" if key == "collectives" else str(row[key]) for row in some if key in row)
            for key in ("processes", "collectives", "verdict")
        }
        cells = [
            engine,
            optimizer,
            ", ".join(said["processes"]),
            *exact,
            ", ".join(said["collectives"]),
            ", ".join(said["verdict"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    here = Path(__file__).parent
    rows = []

    def add(row: dict) -> None:
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "data").mkdir()
        tiny, control = (*tiny_overrides(folder / "data"), *BATCH), folder / "control"
        more = (f"max_steps={STEPS}", "checkpoint.every_steps=1", "checkpoint.keep=999", f"run_dir={control}")
        play(1, RECIPE, *tiny, *more, log=folder / "log")
        for engine in ("zero1", "zero2", "zero3"):
            for processes in PROCESSES:
                add(measure_timm(engine, processes, control, tiny, folder))
        for engine in ENGINES:
            for processes in PROCESSES[engine in ("plain", "ddp") :]:  # in one process these are the control
                add(measure(engine, processes, control, tiny, folder))
        drifts = drift(control, tiny, folder)
    result = {
        "commit": commit(),
        "recipe": f"demo/resnet50 with four blocks, {', '.join(BATCH)}",
        "steps": list(POINTS.values()),
        "rows": rows,
        "drift": drifts,
    }
    instructions = os.environ.get("ATEN_CPU_CAPABILITY")
    file = here / (f"parity-{instructions}.json" if instructions else "parity.json")
    file.write_text(json.dumps(result, indent=1) + "\n")
    if not instructions:
        plot(drifts, here / "parity.png")
        page = ROOT / "docs/engines.md"
        text = page.read_text()
        start, end = (text.index(mark) for mark in TABLE)
        page.write_text(text[: start + len(TABLE[0])] + table(rows) + text[end:])
    return 0 if all(row["verdict"] == "PASS" for row in rows if row["optimizer"] == "lars.LARS") else 1


if __name__ == "__main__":
    sys.exit(main())
