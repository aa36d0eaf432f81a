"""`python -m tests.benchmarks.plan [--json]`: the plan's model against times published by others and measured here.

A row is a run. The constants are fitted to the publications of one half (published_times.yaml) and judged by those of
the other; launch/clusters/README.md says which, and why. The cluster files carry the constants, in three digits.
Writes the table of that page.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import yaml
from scipy.optimize import least_squares
from timm import create_model

from lars.plan import cost
from lars.plan.cluster import Cluster, Device, load_cluster
from lars.plan.cost import RESNET50, Counts, Work, count, evaluation_seconds, step_of
from lars.plan.plan import Plan, make_plan
from lars.plan.render import duration
from lars.recipe import config
from lars.recipe.model_file import import_model_file

ROOT = Path(__file__).parents[2]
TRAINED, EVALUATED = 1_281_167, 50_000  # images of ImageNet
SIZES = {"resnet50": 224, "resnet50_blurpool": 224, "alexnet_bn": 227}
Constants = dict[str, float]

START: Constants = {
    "efficiency": 0.4,  # of GPUs and TPUs
    "efficiency_knl": 0.2,
    "efficiency_xeon": 0.3,
    "memory_passes": 9.0,
    "memory_passes_fused": 5.0,
    "seconds_per_operation": 5e-6,  # of GPUs and TPUs
    "straggling": 0.03,
}
"""What is fitted to others' runs, and where the fit begins. The demo sets `seconds_per_operation` of this machine."""


@dataclass
class Row:
    """A published run; published_times.yaml says what the fields mean."""

    source: str
    half: str
    run: str
    cluster: str
    seconds: float
    epochs: float
    batch: int
    devices: int | None = None
    micro: int | None = None
    model: str = "resnet50"
    size: float | None = None
    wire: float = 4
    fused: bool = False
    memory_bandwidth: float | None = None
    evaluated: int | None = None
    evaluated_size: float | None = None
    evaluated_forwards: int = 1


def rows() -> list[Row]:
    """Runs that others published."""
    published = yaml.safe_load((ROOT / "tests/benchmarks/published_times.yaml").read_text())
    return [Row(source, **shared, **run) for source, shared in published.items() for run in shared.pop("rows")]


@cache
def counts_of(model: str, size: float | None) -> Counts:
    """Of an image of `size` pixels: the same convolutions, so flops and kept bytes follow the pixels."""
    own = SIZES[model]
    if model == "resnet50":
        counts = RESNET50
    else:
        import_model_file(ROOT / "recipes" / model.split("_")[0])
        counts = count(create_model(model), 32, own)
    pixels = ((size or own) / own) ** 2
    return replace(counts, flops=counts.flops * pixels, kept_bytes=counts.kept_bytes * pixels)


@cache
def described(name: str) -> Cluster:
    return load_cluster(ROOT / f"launch/clusters/{name}.yaml")


def with_constants(row: Row, constants: Constants) -> Cluster:
    """The row's cluster as its file describes it, but for what is fitted."""
    cluster = described(row.cluster)
    kind = f"_{row.cluster.split('-')[0]}" if cluster.device.decodes else ""
    own = {"efficiency": constants["efficiency" + kind], "images_per_second": None}
    own["memory_passes"] = constants["memory_passes_fused" if row.fused else "memory_passes"]
    if row.memory_bandwidth:
        own["memory_bandwidth"] = row.memory_bandwidth
    if not kind:
        own["seconds_per_operation"] = constants["seconds_per_operation"]
    device = replace(cluster.device, **own)
    return replace(cluster, device=device, devices=row.devices or cluster.devices, straggling=constants["straggling"])


def predicted(row: Row, constants: Constants, **pinned: float) -> float:
    """Seconds of steps and evaluations; the published loops read their own data, so none is read here."""
    cluster, counts = with_constants(row, {**constants, **pinned}), counts_of(row.model, row.size)
    seen = counts_of(row.model, row.evaluated_size or row.size)
    twice = {name: row.evaluated_forwards * getattr(seen, name) for name in ("flops", "kept_bytes", "operations")}
    micro = row.micro or row.batch // cluster.devices
    work = Work(counts, replace(seen, **twice), EVALUATED, row.batch, micro, "bf16", False, row.wire, 0.0)
    evaluations = row.epochs / row.evaluated if row.evaluated else 0
    steps = row.epochs * TRAINED / row.batch
    return steps * step_of(work, cluster).seconds + evaluations * evaluation_seconds(work, cluster)


# Median of the five seeds committed with 5224b4e, on an otherwise idle machine; the seeds committed now shared theirs.
DEMO_SECONDS = {"resnet50": 105.49, "alexnet": 78.98}
HERE = "seconds_per_operation_here"


def measured_here() -> list[tuple[Row, Plan]]:
    """Runs of the demo and steps of `tests.benchmarks.reduction`, both on 2 processes of 2 cores."""
    found = []
    for name, seconds in DEMO_SECONDS.items():
        recipe = config.load(ROOT / f"recipes/demo/{name}.yaml", ["runtime.micro_batch=32"])
        row = Row("demo", "fit", f"demo/{name}", "cpu-2", seconds, recipe.epochs, 768)
        found.append((row, make_plan(recipe, described("cpu-2"))))
    steps = json.loads((ROOT / "tests/benchmarks/reduction.json").read_text())["steps"]
    for (label, worlds), first in zip(steps.items(), (8, 64)):
        for loop, exact in (("deterministic", "true"), ("not deterministic", "false")):
            keys = ["global_batch=256", "runtime.micro_batch=32", "epochs=4", "max_steps=1"]
            keys += [
                f"runtime.deterministic={exact}",
                f"model.kwargs.channels={[first, 2 * first, 4 * first, 8 * first]}",
            ]
            recipe = config.load(ROOT / "recipes/demo/resnet50.yaml", keys)
            seconds = worlds["2"]["ms"][loop] / 1000
            run = f"a step of ResNet-50 ({label}), {loop}"
            found.append(
                (Row("reduction", "judge", run, "cpu-2", seconds, 0, 256), make_plan(recipe, described("cpu-2")))
            )
    return found


def predicted_here(plan: Plan, constants: Constants) -> float:
    """The whole plan, data and order-free sum included; evaluations are not in the measured seconds."""
    device = replace(described("cpu-2").device, seconds_per_operation=constants[HERE])
    return plan.steps * step_of(plan.work, replace(described("cpu-2"), device=device)).seconds


Run = tuple[Row, Callable[[Constants], float]]


def fit(runs: list[Run], start: Constants) -> Constants:
    """Least squares of log(predicted / published) over the rows of the fitting half, in three digits."""
    fitting = [(row.seconds, predict) for row, predict in runs if row.half == "fit"]

    def constants(logarithms: np.ndarray) -> Constants:
        return dict(zip(start, np.exp(logarithms).tolist()))

    def errors(logarithms: np.ndarray) -> list[float]:
        return [math.log(predict(constants(logarithms)) / seconds) for seconds, predict in fitting]

    found = least_squares(errors, np.log(list(start.values())), x_scale=0.1, xtol=1e-10)
    return {name: float(f"{value:.3g}") for name, value in constants(found.x).items()}


def measure() -> dict:
    """{"constants", "rows", and of the judged rows: median error in per cent, worst factor, interval}."""
    published: list[Run] = [(row, partial(predicted, row)) for row in rows()]
    here: list[Run] = [(row, partial(predicted_here, plan)) for row, plan in measured_here()]
    constants = {**fit(published, START), **fit(here, {HERE: 1e-5})}
    table = [
        {
            "run": row.run,
            "source": row.source,
            "half": row.half,
            "cluster": row.cluster,
            "seconds": row.seconds,
            "predicted_seconds": round(predict(constants), 3),
        }
        for row, predict in published + here
    ]
    return {"constants": constants, "rows": table, **summary(table), "without": without()}


def without() -> dict[str, dict]:
    """Others' runs with one term of the model left out, all else fitted anew: `summary`, and worst of the fitted."""
    both = cost._counted_seconds

    def longer(device: Device, counts: Counts, precision: str) -> float:
        parts = replace(device, memory_passes=0.0), replace(device, efficiency=math.inf)
        return max(both(part, counts, precision) for part in parts)

    changed: dict[str, tuple] = {  # constants that stay, what of cost.py is another, rows without evaluations
        "nothing": ({}, {}, False),
        "adding arithmetic and memory traffic (the longer counts)": ({}, {"_counted_seconds": longer}, False),
        "small passes (`seconds_per_operation` 0)": ({"seconds_per_operation": 0.0}, {}, False),
        "stragglers (`straggling` 0)": ({"straggling": 0.0}, {}, False),
        "the last bucket": ({}, {"BUCKET_BYTES": 0}, False),
        "evaluations": ({}, {}, True),
    }
    found = {}
    for term, (pinned, other, unseen) in changed.items():
        start = {name: value for name, value in START.items() if name not in pinned}
        runs = [replace(row, evaluated=None) if unseen else row for row in rows()]
        with patch.multiple(cost, **other) if other else nullcontext():
            constants = fit([(row, partial(predicted, row, **pinned)) for row in runs], start)
            table = [{**vars(row), "predicted_seconds": predicted(row, constants, **pinned)} for row in runs]
        fitted = [{**row, "half": "judge"} for row in table if row["half"] == "fit"]
        found[term] = {**summary(table), "worst_factor_fitted": summary(fitted)["worst_factor"]}
    return found


def error(row: dict) -> float:
    """Per cent, positive where the plan is too slow."""
    return 100 * (row["predicted_seconds"] / row["seconds"] - 1)


def summary(table: list[dict]) -> dict:
    """Of the judged rows. `interval`: 10th and 90th percentile of published / planned."""
    judged = [row for row in table if row["half"] == "judge"]
    by_source: dict[str, list[float]] = {}
    for row in judged:
        by_source.setdefault(row["source"], []).append(abs(error(row)))
    ratios = [row["seconds"] / row["predicted_seconds"] for row in judged]
    tenths = statistics.quantiles(ratios, n=10, method="inclusive")
    return {
        "median": round(statistics.median(abs(error(row)) for row in judged), 1),
        "median_one_a_publication": round(statistics.median(map(statistics.median, by_source.values())), 1),
        "worst_factor": round(max(max(ratio, 1 / ratio) for ratio in ratios), 2),
        "interval": [round(tenths[0], 2), round(tenths[-1], 2)],
    }


MARKS = "<!-- plan: written by `python -m tests.benchmarks.plan` -->\n", "<!-- end of plan -->\n"


def page_table(result: dict) -> str:
    """What stands between the marks of launch/clusters/README.md."""
    ratios = [row["seconds"] / row["predicted_seconds"] for row in result["rows"] if row["half"] == "judge"]
    judged, (low, high) = len(ratios), result["interval"]
    inside = sum(low <= ratio <= high for ratio in ratios)
    lines = [
        f"Median absolute error of the {judged} judged rows: **{result['median']} %**; each publication counted once: "
        f"{result['median_one_a_publication']} %; worst: a factor of {result['worst_factor']}. "
        f"{inside} of them took {low} to {high} times what is planned.",
        "",
        "Fitted: " + ", ".join(f"`{name}` {value:g}" for name, value in result["constants"].items()) + ".",
        "",
        "| run | published or measured | planned | error | | source |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for half, kind in (("judge", "judged"), ("fit", "fitted")):
        for row in (row for row in result["rows"] if row["half"] == half):
            times = f"{duration(row['seconds'])} | {duration(row['predicted_seconds'])}"
            lines.append(f"| {row['run']} | {times} | {error(row):+.0f} % | {kind} | {row['source']} |")
    lines += ["", "Others' runs with one term left out and all else fitted anew:", ""]
    lines += [
        "| without | median | once a publication | worst judged | worst fitted |",
        "| --- | --- | --- | --- | --- |",
    ]
    for term, found in result["without"].items():
        medians = f"{found['median']} % | {found['median_one_a_publication']} %"
        lines.append(f"| {term} | {medians} | {found['worst_factor']} | {found['worst_factor_fitted']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure()
    page = ROOT / "launch/clusters/README.md"
    before, after = page.read_text().split(MARKS[0])[0], page.read_text().split(MARKS[1])[1]
    page.write_text(before + MARKS[0] + page_table(result) + MARKS[1] + after)
    print(json.dumps(result, indent=1) if args.json else page_table(result), end="\n" if args.json else "")


if __name__ == "__main__":
    main()
