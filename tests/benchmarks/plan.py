"""`python -m tests.benchmarks.plan [--json]`: the plan's model against times published by others and measured here.

A row is a run. FITTED rows set one number of the cluster files (their error is zero but for rounding); all others are
PREDICTED with the files as they are. Last column: the number is fitted anew on all other publications of the row's
group (geometric mean of what each implies), so that there every row is a prediction. Writes the table of
launch/clusters/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

from timm import create_model

from lars.plan.cluster import load_cluster
from lars.plan.cost import RESNET50, Counts, Work, count, step_of
from lars.plan.plan import Plan, make_plan
from lars.plan.render import duration
from lars.recipe import config
from lars.recipe.model_file import import_model_file

ROOT = Path(__file__).parents[2]
FFCV = {16: (11, 13, 14.9), 24: (17, 20, 21.7), 32: (23, 27, 28.7), 40: (29, 34, 35.6), 56: (41, 48, 49.4)}
FFCV[88] = (65, 76, 77.2)
"""Epochs: start and end of the growth of its images (rn50_configs of libffcv/ffcv-imagenet), minutes (its README)."""

EFFICIENCY, PASSES, OPERATION = "device.efficiency", "device.memory_passes", "device.seconds_per_operation"
TUNED = f"{PASSES}=12.6"  # fused layers of NVIDIA's MXNet and of XLA: fitted on NVIDIA's own 90 epochs on one A100


@dataclass
class Row:
    run: str
    source: str  # its publication; a fit that leaves a row out leaves out its whole publication
    cluster: str
    seconds: float
    epochs: float
    batch: int
    micro: int  # images of a device's pass
    model: str = "resnet50"
    size: float = 224  # root of the mean square of the pixels over the run
    wire: float = 4  # bytes of a gradient element
    group: str = ""  # rows that one number is fitted to
    fitted: str = ""  # the number of the cluster file that this row sets
    changes: list[str] = field(default_factory=list)


def ffcv_size() -> float:
    """Of all its epochs: 160 pixels, from the middle of the growth on 192 (its multiples of 32; train_imagenet.py)."""
    sizes = [192 if e >= (start + end) / 2 else 160 for e_all, (start, end, _) in FFCV.items() for e in range(e_all)]
    return math.sqrt(statistics.mean(s * s for s in sizes))


def minutes(value: float) -> float:
    return 60 * value


PASCAL, KNL, XEON, TUNED_GPU, EAGER_GPU, HERE = (
    "fp32 GPU",
    "Xeon Phi 7250",
    "Xeon 8160",
    "tuned bf16",
    "eager bf16",
    "CPU here",
)
GROUP_KEY = {
    PASCAL: EFFICIENCY,
    KNL: EFFICIENCY,
    XEON: EFFICIENCY,
    TUNED_GPU: PASSES,
    EAGER_GPU: PASSES,
    HERE: OPERATION,
}


def rows() -> list[Row]:
    """Runs that others published."""
    nvidia, mlperf3 = "NVIDIA DeepLearningExamples", "MLPerf training 3.0"
    mlperf1, google1 = "MLPerf training 1.0, NVIDIA", "MLPerf training 1.0, Google"
    # devices, minutes, batch and epochs to 75.9 % of the logs
    h100 = [
        (8, 13.466, 3200, 35, ""),
        (64, 2.664, 3200, 35, ""),
        (512, 0.509, 20480, 50, ""),
        (768, 0.369, 32256, 56, ""),
    ]
    h100, knl512 = [*h100, (3584, 0.183, 57344, 77, OPERATION)], ["devices=512"]
    a100 = [(8, minutes(28.7), 3264, 35), (64, 294.5, 13056, 45), (2480, 24, 64480, 86.1)]  # the last: batch inferred
    tpu4 = [(64, 258, 8192, 42), (2048, 17.1, 32768, 60), (3456, 13.8, 55296, 78)]
    timm = 90 * 1_281_167 / 2600  # 2,600 images/s, as the seconds of 90 epochs
    return [
        Row("8 P100", "Goyal 2017", "dgx-1", minutes(29 * 60), 90, 256, 32, group=PASCAL, fitted=EFFICIENCY),
        Row("256 P100", "Goyal 2017", "p100-256", minutes(65), 90, 8192, 32, group=PASCAL),
        Row("1,024 P100", "Akiba 2017", "p100-1024", minutes(15), 90, 32768, 32, wire=2, group=PASCAL),
        Row("2,048 P40", "Jia 2018", "p40-2048", minutes(6.6), 90, 65536, 32, wire=2, group=PASCAL),
        Row("2,048 P40, AlexNet", "Jia 2018", "p40-2048", minutes(4), 95, 65536, 32, "alexnet_bn", 227, 2, PASCAL),
        Row("one M40", "You 2018", "m40-1", minutes(14 * 24 * 60), 90, 256, 32, group=PASCAL),
        Row("1,536 KNL", "Codreanu 2017", "knl-7250-1536", minutes(28), 90, 24576, 16, group=KNL, fitted=EFFICIENCY),
        Row("R1: 2,048 KNL", "You 2018", "knl-7250-2048", minutes(20), 90, 32768, 16, group=KNL),
        Row("R2: 2,048 KNL, 64 epochs", "You 2018", "knl-7250-2048", minutes(14), 64, 32768, 16, group=KNL),
        Row("512 KNL", "You 2017", "knl-7250-2048", minutes(60), 90, 32768, 64, group=KNL, changes=knl512),
        Row(
            "512 KNL, AlexNet",
            "You 2017",
            "knl-7250-2048",
            minutes(24),
            100,
            32768,
            64,
            "alexnet_bn",
            227,
            group=KNL,
            changes=knl512,
        ),
        Row(
            "448 nodes of 2 Xeon",
            "Codreanu 2017",
            "xeon-8160-448-nodes",
            minutes(60),
            90,
            14336,
            16,
            group=XEON,
            fitted=EFFICIENCY,
        ),
        Row("1,024 Xeon", "You 2017", "xeon-8160-1024", minutes(48), 90, 32768, 32, group=XEON),
        Row(
            "1,600 Xeon", "You 2017", "xeon-8160-1024", minutes(32), 90, 32000, 20, group=XEON, changes=["devices=1600"]
        ),
        Row(
            "A1: 1,024 Xeon, AlexNet",
            "You 2018",
            "xeon-8160-1024",
            minutes(11),
            100,
            32768,
            32,
            "alexnet_bn",
            227,
            group=XEON,
        ),
        Row(
            "one A100, MXNet",
            nvidia,
            "a100-8",
            8.75 * 3600,
            90,
            512,
            512,
            group=TUNED_GPU,
            fitted=PASSES,
            changes=["devices=1"],
        ),
        Row("8 A100, MXNet", nvidia, "a100-8", 1.14 * 3600, 90, 4096, 512, wire=2, group=TUNED_GPU),
        *(
            Row(
                f"{n:,} A100",
                mlperf1,
                "a100-2480",
                seconds,
                epochs,
                b,
                b // n,
                wire=2,
                group=TUNED_GPU,
                changes=[f"devices={n}"],
            )
            for n, seconds, b, epochs in a100
        ),
        *(
            Row(
                f"{n:,} H100",
                mlperf3,
                "h100-64",
                minutes(m),
                epochs,
                b,
                b // n,
                "resnet50",
                224,
                2,
                TUNED_GPU,
                sets,
                [f"devices={n}"],
            )
            for n, m, b, epochs, sets in h100
        ),
        Row("1,024 TPU v3", "Ying 2018", "tpu-v3-1024", minutes(2.2), 90, 32768, 32, group=TUNED_GPU),
        *(
            Row(
                f"{n:,} TPU v4",
                google1,
                "tpu-v4-3456",
                seconds,
                epochs,
                b,
                b // n,
                group=TUNED_GPU,
                changes=[f"devices={n}"],
            )
            for n, seconds, b, epochs in tpu4
        ),
        Row(
            "one A100, timm",
            "timm issue 1491",
            "a100-8",
            timm,
            90,
            512,
            512,
            group=EAGER_GPU,
            fitted=PASSES,
            changes=["devices=1"],
        ),
        Row(
            "8 A100, FFCV, its six runs",
            "FFCV",
            "a100-8",
            minutes(sum(m for _, _, m in FFCV.values())),
            sum(FFCV),
            4096,
            512,
            "resnet50_blurpool",
            ffcv_size(),
            group=EAGER_GPU,
        ),
    ]


SIZES = {"resnet50": 224, "resnet50_blurpool": 224, "alexnet_bn": 227}


@lru_cache
def counts_of(model: str) -> Counts:
    if model == "resnet50":
        return RESNET50
    import_model_file(ROOT / "recipes" / model.split("_")[0])
    return count(create_model(model), 32, SIZES[model])


def predicted(row: Row, changes: tuple[str, ...] = ()) -> float:
    """Seconds of the training steps; the published loops read their own data, so none is read here."""
    tuned = [TUNED, "device.images_per_second=null"] if row.group == TUNED_GPU else []
    eager = ["device.images_per_second=null"] if row.group == EAGER_GPU else []
    cluster = load_cluster(ROOT / f"launch/clusters/{row.cluster}.yaml", [*tuned, *eager, *row.changes, *changes])
    counts = counts_of(row.model)
    # the same convolutions on images of another size: flops and kept bytes follow the pixels
    pixels = (row.size / SIZES[row.model]) ** 2
    counts = replace(counts, flops=counts.flops * pixels, kept_bytes=counts.kept_bytes * pixels)
    work = Work(counts, counts, 0, row.batch, row.micro, "bf16", False, row.wire, 0.0)
    return row.epochs * 1_281_167 / row.batch * step_of(work, cluster).seconds


# Median of the five seeds committed with 5224b4e, on an otherwise idle machine; the seeds committed now shared theirs.
DEMO_SECONDS = {"resnet50": 105.49, "alexnet": 78.98}


def measured_here() -> list[tuple[Row, Plan]]:
    """Runs of the demo and steps of `tests.benchmarks.reduction`, both on 2 processes of 2 cores."""
    import_model_file(ROOT / "recipes/demo")
    here, found = load_cluster(ROOT / "launch/clusters/cpu-2.yaml"), []
    for name in ("resnet50", "alexnet"):
        recipe = config.load(ROOT / f"recipes/demo/{name}.yaml", ["runtime.micro_batch=32"])
        fitted, size = OPERATION if name == "resnet50" else "", recipe.model.image_size
        row = Row(
            f"demo/{name}",
            "demo",
            "cpu-2",
            DEMO_SECONDS[name],
            recipe.epochs,
            768,
            32,
            name,
            size,
            group=HERE,
            fitted=fitted,
        )
        found.append((row, make_plan(recipe, here)))
    steps = json.loads((ROOT / "tests/benchmarks/reduction.json").read_text())["steps"]
    for (label, worlds), first in zip(steps.items(), (8, 64)):
        for loop, exact in (("deterministic", "true"), ("not deterministic", "false")):
            keys = [
                "global_batch=256",
                "runtime.micro_batch=32",
                "epochs=4",
                f"runtime.deterministic={exact}",
                "max_steps=1",
            ]
            channels = f"model.kwargs.channels={[first, 2 * first, 4 * first, 8 * first]}"
            recipe = config.load(ROOT / "recipes/demo/resnet50.yaml", [*keys, channels])
            seconds = worlds["2"]["ms"][loop] / 1000
            row = Row(f"a step of ResNet-50 ({label}), {loop}", "reduction", "cpu-2", seconds, 0, 256, 32, group=HERE)
            found.append((row, make_plan(recipe, here)))
    return found


def predicted_here(row: Row, plan: Plan, changes: tuple[str, ...] = ()) -> float:
    """The whole plan, data and order-free sum included; evaluations are not in the measured seconds."""
    return (
        plan.steps
        * step_of(plan.work, load_cluster(ROOT / f"launch/clusters/{row.cluster}.yaml", list(changes))).seconds
    )


def implied(predict: Callable[[tuple[str, ...]], float], seconds: float, key: str) -> float | None:
    """The value of `key` with which the prediction is `seconds`; None if there is none."""
    low, high = (1e-4, 1e4) if key == PASSES else (1e-3, 10.0) if key == EFFICIENCY else (1e-9, 1e-1)

    def late(value: float) -> bool:
        return predict((f"{key}={value!r}",)) > seconds

    rising = key != EFFICIENCY  # a higher efficiency is faster, the other two are costs
    if late(high) != rising or late(low) == rising:
        return None
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if late(middle) == rising else (middle, high)
    return math.sqrt(low * high)


def measure() -> dict:
    """{"rows": [...], medians of absolute errors in per cent}."""
    runs = [(row, partial(predicted, row)) for row in rows()] + [
        (row, partial(predicted_here, row, plan)) for row, plan in measured_here()
    ]
    values: dict[str, dict[str, list[float]]] = {}  # group: {publication: what its rows imply}
    for row, predict in runs:
        value = implied(predict, row.seconds, GROUP_KEY[row.group]) if row.model == "resnet50" else None
        if value:
            values.setdefault(row.group, {}).setdefault(row.source, []).append(value)
    table = []
    for row, predict in runs:
        others = [
            statistics.geometric_mean(v) for source, v in values.get(row.group, {}).items() if source != row.source
        ]
        left_out = predict((f"{GROUP_KEY[row.group]}={statistics.geometric_mean(others)!r}",)) if others else None
        table.append(
            {
                "run": row.run,
                "source": row.source,
                "cluster": row.cluster,
                "seconds": round(row.seconds, 3),
                "predicted_seconds": round(predict(()), 3),
                "fitted": row.fitted,
                "group": row.group,
                "left_out_seconds": None if left_out is None else round(left_out, 3),
            }
        )
    return {"rows": table, **medians(table)}


def error(row: dict, kind: str = "predicted_seconds") -> float:
    """Per cent, positive where the plan is too slow."""
    return 100 * (row[kind] / row["seconds"] - 1)


def medians(table: list[dict]) -> dict[str, float]:
    unfitted = [row for row in table if not row["fitted"]]
    by_source: dict[tuple[str, str], list[float]] = {}
    for row in unfitted:
        by_source.setdefault((row["source"], row["cluster"]), []).append(abs(error(row)))
    return {
        "median_unfitted": round(statistics.median(abs(error(row)) for row in unfitted), 1),
        "median_one_a_publication": round(statistics.median(map(statistics.median, by_source.values())), 1),
        "median_left_out": round(
            statistics.median(abs(error(row, "left_out_seconds")) for row in table if row["left_out_seconds"]), 1
        ),
    }


MARKS = "<!-- plan: written by `python -m tests.benchmarks.plan` -->\n", "<!-- end of plan -->\n"


def page_table(result: dict) -> str:
    """What stands between the marks of launch/clusters/README.md."""
    table = result["rows"]
    lines = [
        f"Median absolute error of the {sum(not row['fitted'] for row in table)} rows that were not fitted: "
        f"{result['median_unfitted']} %; each publication and cluster counted once: "
        f"{result['median_one_a_publication']} %; left out: {result['median_left_out']} %.",
        "",
        "| run | published or measured | planned | error | | left out | source |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table:
        kind = f"fitted: {row['fitted'].removeprefix('device.')}" if row["fitted"] else "predicted"
        left = f"{error(row, 'left_out_seconds'):+.0f} %" if row["left_out_seconds"] else ""
        times = f"{duration(row['seconds'])} | {duration(row['predicted_seconds'])}"
        lines.append(f"| {row['run']} | {times} | {error(row):+.0f} % | {kind} | {left} | {row['source']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure()
    page = ROOT / "launch/clusters/README.md"
    before, after = page.read_text().split(MARKS[0])[0], page.read_text().split(MARKS[1])[1]
    page.write_text(before + MARKS[0] + page_table(result) + MARKS[1] + after)
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(page_table(result), end="")


if __name__ == "__main__":
    main()
