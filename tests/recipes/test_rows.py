"""Every published row is a recipe: its arithmetic, rates, model and order at the real size, two real steps in small."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import sources_page as sources
import timm
import torch
import yaml
from conftest import DEMO, ROOT

import recipes.alexnet.model
import recipes.resnet50.model  # noqa: F401  registers resnet50_mlperf
from lars.data.index import Index
from lars.data.order import Order
from lars.engine.build import build_optimizer
from lars.recipe import config
from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe
from lars.recipe.schedule import Schedule
from lars.report.report import expectation
from recipes.train import main

IMAGENET = 1_281_167

# The published rows and the recipes that stand for them.
# `paper`: You et al. 2018. `nvcaffe`: the LARS authors' Caffe files.
ROWS = {
    "paper: AlexNet, 32K, 100 epochs, 1,024 workers": "alexnet/lars-b32k-100ep",
    "paper: ResNet-50, 32K, 90 epochs, 2,048 workers": "resnet50/lars-b32k-90ep-bn16",
    "paper: ResNet-50, 32K, 64 epochs, 2,048 workers": "resnet50/lars-b32k-64ep",
    "paper: ResNet-50, 256, the baseline": "resnet50/sgd-b256-90ep",
    "nvcaffe: AlexNet-BN 8K": "alexnet/lars-b8k-100ep",
    "nvcaffe: AlexNet-BN 16K": "alexnet/lars-b16k-100ep",
    "nvcaffe: AlexNet-BN 32K": "alexnet/lars-b32k-100ep-bn1024",
    "nvcaffe: AlexNet-BN 32K, that fork's own rule": "alexnet/lars-b32k-100ep-caffe-rule",
    "nvcaffe: ResNet-50 1K": "resnet50/lars-b1k-100ep",
    "notes on 1708.03888: AlexNet 256": "alexnet/sgd-b256-100ep",
    "notes on 1708.03888: AlexNet 4K, linear scaling": "alexnet/sgd-b4k-100ep",
    "notes on 1708.03888: AlexNet 8K, linear scaling": "alexnet/sgd-b8k-100ep",
    "Goyal: ResNet-50 8K, linear scaling": "resnet50/sgd-b8k-90ep",
    "dm-haiku: ResNet-50 32K, linear scaling": "resnet50/sgd-b32k-90ep",
    "NUS-HPC 512": "resnet50/nus-b512-90ep",
    "NUS-HPC 1,024": "resnet50/nus-b1k-90ep",
    "NUS-HPC 4,096": "resnet50/nus-b4k-90ep",
    "NUS-HPC 8,192": "resnet50/nus-b8k-90ep",
    "NUS-HPC 16,384": "resnet50/nus-b16k-90ep",
    "NUS-HPC 32,768": "resnet50/lars-b32k-90ep",
    "FFCV: ResNet-50, 16 epochs": "resnet50/ffcv-16ep",
    "FFCV: ResNet-50, 88 epochs": "resnet50/ffcv-88ep",
    "MLPerf 1,632": "resnet50/mlperf-b1632",
    "MLPerf 3,264": "resnet50/mlperf-b3264",
    "MLPerf 4,096": "resnet50/mlperf-b4k",
    "MLPerf 8,192": "resnet50/mlperf-b8k",
    "MLPerf 13,056": "resnet50/mlperf-b13056",
    "MLPerf 32,768": "resnet50/mlperf-b32k",
    "MLPerf 49,152": "resnet50/mlperf-b48k",
    "MLPerf 58,880": "resnet50/mlperf-b58880",
    "MLPerf 65,536": "resnet50/mlperf-b64k",
    "MLPerf 67,840": "resnet50/mlperf-b67840",
}
NAMES = sorted(ROWS.values())

# By hand, from the sources in the headers: recipe: (steps, rate of step 0, then (step, rate) before and after the end
# of warm-up, in the middle, at the last step).
# With N = 1,281,167, batch B, E epochs, w = warm-up epochs x N / B and T = E x N / B:
#   warm-up   first + (base - first) x (t / w)^p               p = 2 and first = 1 in nvcaffe, else p = 1 and first = 0
#   decay     end + (base - end) x (1 - t / T)^2               nvcaffe, from the start: the rate falls at w
#             end + (base - end) x (1 - (t - w) / (T - w))^2   NUS-HPC and SGD, from the end of warm-up
#             the same with power 1                            FFCV
#             end + (base - end) x (1 - (t - w) / d)^2         MLPerf, d steps; end = 1e-4, and it stays there
RATES = {
    # w = 25022.79, T = 500455.86
    "alexnet/sgd-b256-100ep": (
        500456,
        0.0,
        (25022, 0.00999968),
        (25023, 0.00999999),
        (250228, 0.00277008),
        (500455, 3.267e-14),
    ),
    # w = 1563.92, T = 31278.49
    "alexnet/sgd-b4k-100ep": (31278, 0.0, (1563, 0.159905), (1564, 0.159999), (15639, 0.0443227), (31277, 4.03e-10)),
    # w = 781.96, T = 15639.25
    "alexnet/sgd-b8k-100ep": (15639, 0.0, (781, 0.319606), (782, 0.319998), (7819, 0.0886568), (15638, 2.249e-09)),
    # w = 601.49, T = 15639.25
    "alexnet/lars-b8k-100ep": (15639, 1.0, (601, 9.98548), (602, 9.24496), (7819, 2.5004), (15638, 6.344e-08)),
    # w = 390.98, T = 7819.62
    "alexnet/lars-b16k-100ep": (7820, 1.0, (390, 23.8847), (391, 21.6599), (3910, 5.99942), (7819, 1.522e-07)),
    # w = 390.98, T = 3909.81
    "alexnet/lars-b32k-100ep": (3910, 1.0, (390, 31.8446), (391, 25.9197), (1955, 7.99923), (3909, 1.378e-06)),
    # w = 390.98, T = 3909.81
    "alexnet/lars-b32k-100ep-bn1024": (3910, 1.0, (390, 31.8446), (391, 25.9197), (1955, 7.99923), (3909, 1.378e-06)),
    # w = 390.98, T = 3909.81
    "alexnet/lars-b32k-100ep-caffe-rule": (
        3910,
        1.0,
        (390, 31.8446),
        (391, 25.9197),
        (1955, 7.99923),
        (3909, 1.378e-06),
    ),
    # w = 25022.79, T = 450410.27
    "resnet50/sgd-b256-90ep": (
        450410,
        0.0,
        (25022, 0.0999968),
        (25023, 0.0999999),
        (225205, 0.0280277),
        (450409, 8.962e-13),
    ),
    # w = 781.96, T = 14075.32
    "resnet50/sgd-b8k-90ep": (14075, 0.0, (781, 3.19606), (782, 3.19998), (7037, 0.897054), (14074, 3.16e-08)),
    # w = 195.49, T = 3518.83
    "resnet50/sgd-b32k-90ep": (3519, 0.0, (195, 12.7679), (196, 12.7961), (1759, 3.58924), (3518, 7.989e-07)),
    # w = 10009.12, T = 125113.96
    "resnet50/lars-b1k-100ep": (125114, 1.0, (10009, 8.99981), (10010, 7.61748), (62557, 2.25), (125113, 5.352e-10)),
    # w = 390.98, T = 225205.14
    "resnet50/nus-b512-90ep": (225205, 0.0, (390, 3.98996), (391, 4), (112602, 1.00349), (225204, 1.023e-10)),
    # w = 390.98, T = 112602.57
    "resnet50/nus-b1k-90ep": (112603, 0.0, (390, 5.64266), (391, 5.65685), (56301, 1.4241), (112602, 1.451e-10)),
    # w = 390.98, T = 28150.64
    "resnet50/nus-b4k-90ep": (28151, 0.0, (390, 11.2853), (391, 11.3137), (14075, 2.90879), (28150, 6.053e-09)),
    # w = 390.98, T = 14075.32
    "resnet50/nus-b8k-90ep": (14075, 0.0, (390, 15.9598), (391, 16), (7037, 4.23263), (14074, 1.491e-07)),
    # w = 390.98, T = 7037.66
    "resnet50/nus-b16k-90ep": (7038, 0.0, (390, 22.5706), (391, 22.6273), (3519, 6.34133), (7037, 2.235e-07)),
    # w = 547.37, T = 3518.83
    "resnet50/lars-b32k-90ep": (3519, 0.0, (547, 31.9782), (548, 31.9865), (1759, 11.2241), (3518, 2.498e-06)),
    # w = 547.37, T = 3518.83
    "resnet50/lars-b32k-90ep-bn16": (3519, 0.0, (547, 31.9782), (548, 31.9865), (1759, 11.2241), (3518, 2.498e-06)),
    # w = 625.57, T = 2502.28
    "resnet50/lars-b32k-64ep": (2502, 0.0, (625, 21.1807), (626, 21.1903), (1251, 9.42438), (2501, 0.0001099)),
    # w = 625.57, T = 5004.56; first = 1e-4 of the rate, the decay is a line
    "resnet50/ffcv-16ep": (5005, 0.00017, (625, 1.69845), (626, 1.69983), (2502, 0.971537), (5004, 0.0002169)),
    # w = 625.57, T = 27525.07
    "resnet50/ffcv-88ep": (27525, 0.00017, (625, 1.69845), (626, 1.69997), (13762, 0.869801), (27524, 6.777e-05)),
    # w = 1570.06, T = 29046.07, d = 27476
    "resnet50/mlperf-b1632": (29046, 0.0, (1570, 7.39973), (1571, 7.39949), (14523, 2.06755), (29045, 0.0001)),
    # w = 785.03, T = 14523.03, d = 13738
    "resnet50/mlperf-b3264": (14523, 0.0, (785, 10.4996), (786, 10.4985), (7261, 2.93406), (14522, 0.0001001)),
    # w = 1563.92, T = 13136.97, d = 11573
    "resnet50/mlperf-b4k": (13137, 0.0, (1563, 9.99409), (1564, 9.99987), (6568, 3.22185), (13136, 0.0001001)),
    # w = 781.96, T = 6881.27, d = 6095
    "resnet50/mlperf-b8k": (6881, 0.0, (781, 16.9791), (782, 16.9998), (3440, 5.40576), (6880, 0.0001)),
    # w = 883.16, T = 4710.17, d = 3827
    "resnet50/mlperf-b13056": (4710, 0.0, (883, 12.7977), (884, 12.7944), (2355, 4.84773), (4709, 0.0001012)),
    # w = 625.57, T = 2267.69, d = 1641
    "resnet50/mlperf-b32k": (2268, 0.0, (625, 21.1807), (626, 21.1889), (1134, 10.0984), (2267, 0.0001)),
    # w = 625.57, T = 1850.64, d = 1220
    "resnet50/mlperf-b48k": (1851, 0.0, (625, 19.3873), (626, 19.3913), (925, 11.0486), (1850, 0.0001)),
    # w = 631.01, T = 1805.99, d = 1154
    "resnet50/mlperf-b58880": (1806, 0.0, (631, 23.2456), (632, 23.2061), (903, 13.5795), (1805, 0.0001)),
    # w = 606.02, T = 1739.87, d = 1133
    "resnet50/mlperf-b64k": (1740, 0.0, (606, 24.6982), (607, 24.6563), (870, 14.5305), (1739, 0.0001)),
    # w = 585.44, T = 1718.55, d = 1133
    "resnet50/mlperf-b67840": (1719, 0.0, (585, 24.6805), (586, 24.6745), (859, 14.2119), (1718, 0.0001037)),
}

# As published; norms after pooling have no scale or shift, those before have 2 x 1,376, and their convolutions no 1,376
# biases.
PARAMETERS = {
    "alexnet": 60_965_224,
    "alexnet_bn": 60_966_600,
    "alexnet_bn_post": 60_965_224,
    "resnet50": 25_557_032,
    "resnet50_mlperf": 25_557_032,
    "resnet50_blurpool": 25_557_032,
}

# One recipe of each (model, optimizer, shape of the schedule); the others run in `make test-long`.
OF_EACH_KIND = [
    "alexnet/lars-b32k-100ep-caffe-rule",
    "alexnet/lars-b8k-100ep",
    "alexnet/sgd-b4k-100ep",
    "resnet50/ffcv-16ep",
    "resnet50/lars-b1k-100ep",
    "resnet50/lars-b32k-90ep",
    "resnet50/mlperf-b58880",
    "resnet50/nus-b8k-90ep",
    "resnet50/sgd-b32k-90ep",
]


@functools.cache
def recipe_of(name: str) -> Recipe:
    return config.load(ROOT / "recipes" / f"{name}.yaml", [])


def header_of(name: str) -> str:
    return "".join(
        line for line in (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines(True) if line.startswith("#")
    )


def kind(name: str) -> tuple:
    r = recipe_of(name)
    rule = r.optimizer.name, str(getattr(r.optimizer, "adapt_1d", None))
    return r.model.name, *rule, r.schedule.warmup_power, r.schedule.decay_from, r.schedule.decay_steps is None


def passes_at_default(r: Recipe) -> int:
    return r.global_batch // (r.bn_group or math.gcd(r.global_batch, 64))


def test_every_published_row_is_a_recipe_and_every_recipe_a_row() -> None:
    written = {
        f"{f.parent.name}/{f.stem}"
        for model in ("alexnet", "resnet50")
        for f in (ROOT / "recipes" / model).glob("*.yaml")
    }
    assert written == set(NAMES) == set(RATES) and len(NAMES) == len(ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_command_hardware_sources_and_what_was_published(name: str) -> None:
    header, r = header_of(name), recipe_of(name)
    for part in (
        "Not yet run here",
        "Published:",
        "Hardware:",
        "Expected time",
        "Sources:",
        f"--config recipes/{name}.yaml",
    ):
        assert part in header
    assert f"batch {r.global_batch:,}" in header and max(map(len, header.splitlines())) <= 140
    many = re.search(r"up to ([\d,]+) GPUs", header)
    if many:
        assert int(many[1].replace(",", "")) == passes_at_default(r)
    else:
        assert passes_at_default(r) <= 8
    published = yaml.safe_load((ROOT / "recipes/published.yaml").read_text()).get(name)
    assert ("state no accuracy" if published is None else str(published.get("top1", published.get("reach")))) in header


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_comes_out_even_at_the_real_size(name: str) -> None:
    r = recipe_of(name)
    largest = passes_at_default(r)
    for processes in sorted({1, 8, 64, largest}):
        if largest % processes == 0:
            plan = BatchPlan.of(r, IMAGENET, processes)
            assert (
                plan.passes_per_process * processes * plan.micro_batch
                == r.global_batch
                == plan.passes * plan.micro_batch
            )
            assert plan.steps == RATES[name][0]
        else:
            with pytest.raises(config.RecipeError, match=f"{processes} processes do not divide"):
                BatchPlan.of(r, IMAGENET, processes)


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_those_computed_by_hand(name: str) -> None:
    r = recipe_of(name)
    schedule = Schedule.of(r, BatchPlan.of(r, IMAGENET, 1))
    steps, first, before, after, middle, last = RATES[name]
    assert schedule.rate(0) == first
    for step, rate in (before, after, middle):
        assert schedule.rate(step) == pytest.approx(rate, rel=5e-6)  # six digits; below, four
    assert last[0] == steps - 1 and schedule.rate(last[0]) == pytest.approx(last[1], rel=5e-4)


@pytest.mark.parametrize("name", [n for n in NAMES if "mlperf" in n])
def test_a_reference_point_has_the_numbers_of_the_package(name: str) -> None:
    """With mlperf-logging installed: every number again, and whether the horizon contains every seed's convergence."""
    folder = Path(pytest.importorskip("mlperf_logging").__file__).parent
    points = json.loads((folder / "rcp_checker/training_4.0.0/rcps_resnet.json").read_text())
    r = recipe_of(name)
    point = points[f"resnet_ref_{r.global_batch}"]
    keys, seeds = point["Hyperparams"], point["Epochs to converge"]
    assert r.optimizer.lr == keys["opt_base_learning_rate"] and r.optimizer.momentum == keys["opt_momentum"]
    assert r.optimizer.weight_decay == keys["opt_weight_decay"] and r.bn_group == keys["model_bn_span"]
    # Google's code keeps the rate inside the velocity, NVIDIA's momentum correction is the same as outside
    rule = {"Google": "paper", "NVIDIA": "torch"}[point["Creator"]]
    assert (r.optimizer.eps, r.optimizer.momentum_mode, r.schedule.power, r.schedule.end_lr) == (0, rule, 2, 1e-4)
    std = {"Google": [1.0, 1.0, 1.0], "NVIDIA": [58.395, 57.12, 57.375]}[point["Creator"]]
    assert (r.model.name, r.augment.scale[0], r.augment.std) == ("resnet50_mlperf", 0.05, std)
    assert r.schedule.warmup_epochs == keys["opt_learning_rate_warmup_epochs"] and r.augment.label_smoothing == 0.1
    logged, warmup = keys["opt_learning_rate_decay_steps"], r.schedule.warmup_epochs * IMAGENET / r.global_batch
    # a decay counted from the start ends too early if a seed converges after it; half a step, because files round
    early = (logged + 0.5) * r.global_batch / IMAGENET < max(seeds)
    assert r.schedule.decay_steps == (logged if early else round(logged - warmup))
    ends = (warmup + r.schedule.decay_steps) * r.global_batch / IMAGENET
    assert max(seeds) <= r.epochs and r.epochs - 1 < ends <= r.epochs + 0.001
    assert yaml.safe_load((ROOT / "recipes/published.yaml").read_text())[name]["epochs"] == seeds


def test_mlperfs_first_weights() -> None:
    """Deviations within 1 % of the layers with the most weights: 2.4 million draws put them within 0.05 % of it."""
    torch.manual_seed(0)
    model = timm.create_model("resnet50_mlperf", num_classes=1000)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.numel() > 2_000_000]
    assert len(convolutions) == 4
    for layer in convolutions:
        assert float(layer.weight.detach().std()) == pytest.approx((2 / layer.weight[0].numel()) ** 0.5, rel=0.01)
    assert float(model.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.01) and not model.fc.bias.any()
    gammas = [m.weight for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(gammas) == 53 and all(bool((g == 1).all()) for g in gammas)


def test_the_nus_rows_run_their_sources_own_rule() -> None:
    for name in (n for n in NAMES if "nus-" in n):
        r = recipe_of(name)
        assert (r.optimizer.name, r.optimizer.eps, r.model.kwargs) == ("lars_outside", 1e-5, {"zero_init_last": False})
        # torch: 1 - s + s / K for the right class; theirs: 1 - 0.1, and 0.1 / (K - 1) for each other one
        s = r.augment.label_smoothing
        assert 1 - s + s / 1000 == pytest.approx(0.9, abs=1e-15) and s / 1000 == pytest.approx(0.1 / 999, abs=1e-15)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_the_models_have_the_published_size(name: str) -> None:
    assert {recipe_of(n).model.name for n in NAMES} <= set(PARAMETERS)
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("batch", "group"), sorted({(recipe_of(n).global_batch, recipe_of(n).bn_group or 0) for n in NAMES})
)
def test_a_step_at_the_real_batch_is_as_many_distinct_samples(batch: int, group: int) -> None:
    rows = np.full(-(-IMAGENET // 100), 100)  # about 12,800 row groups in 294 files
    rows[-1] -= rows.sum() - IMAGENET
    numbers = np.arange(len(rows))
    index = Index(tuple(map(str, range(294))), numbers * 294 // len(rows), numbers, rows, "")
    ids = Order(index, 0, batch, group or None).ids(3, range(batch))
    assert len(np.unique(ids)) == len(ids) == batch and ids.min() >= 0 and ids.max() < IMAGENET


def test_what_a_recipe_runs_otherwise_than_its_source_has_a_reason() -> None:
    """Of every key of every row; each value has its file, commit and line, and the page is what they say."""
    pytest.importorskip("mlperf_logging")
    written = sources.written()
    assert set(NAMES) - set(written["recipes"]) == {"resnet50/lars-b32k-64ep", "resnet50/lars-b32k-90ep-bn16"}
    assert all(re.fullmatch("[0-9a-f]{40}", file["commit"]) for file in written["sources"].values())
    cited = [one for keys in written["recipes"].values() for one in keys.values()]
    assert len(cited) > 1000 and all(one["source"] in written["sources"] and one["line"] > 0 for one in cited)
    different = sources.differences()
    assert [where for where, why in different.items() if not why] == []
    assert ("resnet50/lars-b32k-90ep", "optimizer.name") in different  # it can find one
    assert sources.PAGE.read_text() == sources.page(), "write it anew: python -m tests.recipes.sources_page"


def test_every_publication_has_a_recipe_and_a_source() -> None:
    published = yaml.safe_load((ROOT / "recipes/published.yaml").read_text())
    assert set(published) <= set(NAMES)
    for name, row in published.items():
        assert row["source"] and (set(row) - {"source", "control"} in ({"top1"}, {"reach", "epochs"})), name


def test_every_published_row_has_an_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    silent = {n for n in NAMES if expectation(n) is None}
    assert silent == {n for n in NAMES if "state no accuracy" in header_of(n)}


def test_the_caffe_rule_adapts_and_decays_every_tensor() -> None:
    for name, groups in (
        ("alexnet/lars-b32k-100ep-caffe-rule", [(True, 5e-4, False, 16)]),
        ("alexnet/lars-b32k-100ep-bn1024", [(True, 5e-4, True, 8), (False, 0.0, True, 8)]),
    ):
        optimizer = build_optimizer(recipe_of(name), timm.create_model("alexnet_bn_post", width=0.125, image_size=67))
        told = [(g["adapt"], g["weight_decay"], g["decay_in_norm"], len(g["params"])) for g in optimizer.param_groups]
        assert told == groups


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for source, rows in (("train-00000-of-00005", 101), ("validation-00000-of-00001", 23)):
        pq.write_table(
            pq.read_table(DEMO / "data" / f"{source}.parquet").slice(0, rows),
            folder / f"{source}.parquet",
            row_group_size=25,
        )
    return folder


def scaled_down(r: Recipe, data: Path) -> list[str]:
    """Two steps of 16 images in groups of 4, an eighth of the width, the smallest images.

    Rates and rules stay the recipe's.
    """
    alexnet, size = r.model.name.startswith("alexnet"), 67 if r.model.name.startswith("alexnet") else 28
    model = (
        ["model.kwargs.width=0.125"]
        if alexnet
        else ["model.kwargs.channels=[8,16,32,64]", "model.kwargs.layers=[1,1,1,1]"]
    )
    batch = ["global_batch=16", f"bn_group={4 if r.bn_group else 'null'}", "runtime.micro_batch=8"]
    sizes = [
        f"model.image_size={size}",
        f"augment.eval_resize={size}",
        *([f"augment.resize={size + 5}"] if r.augment.resize else []),
        *([f"augment.sizes=[{size - 8},{size}]"] if r.augment.sizes else []),
    ]
    return [
        f"data.path={data}",
        "data.workers=1",
        "model.num_classes=10",
        *model,
        *batch,
        *sizes,
        "max_steps=2",
        "trackers=[]",
    ]


def test_each_kind_of_recipe_is_trained_once() -> None:
    assert sorted(map(kind, OF_EACH_KIND)) == sorted({kind(n) for n in NAMES})


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `main` sets for its whole process, put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    threads, deterministic, before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        dict(os.environ),
    )
    monkeypatch.chdir(ROOT)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("name", [n if n in OF_EACH_KIND else pytest.param(n, marks=pytest.mark.long) for n in NAMES])
def test_two_real_steps(name: str, small_data: Path, tmp_path: Path, restored: None) -> None:
    r = recipe_of(name)
    assert main(["--config", f"recipes/{name}.yaml", *scaled_down(r, small_data), f"run_dir={tmp_path}"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["steps"], result["recipe"]) == ("finished", 2, name)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, second = (line for line in lines if line["kind"] == "train")
    assert 1.5 < first["loss"] < 4 and math.isfinite(second["loss"])  # ln 10 = 2.3
    assert first["lr"] == RATES[name][1] and second["lr"] > first["lr"]
