"""MLPerf's log of a run (`mllog=true`, `RUN/mllog.txt`), and `lars mllog RUN...`, which lets MLPerf's package judge it.

The command prints what `mlperf_logging.compliance_checker --usage training --ruleset 4.0.0` says of every run, and with
two runs or more what its convergence check makes of their epochs to target beside the reference points of the same
batch. Exit status 1 if either objects. A log that passes is well formed: it is a result of the benchmark only where
`broken_rules` is empty, too.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe
from lars.recipe.refusal import RecipeError, one_line, refuses
from lars.recipe.schedule import Schedule, evaluation_epochs
from lars.run.folder import write_atomically
from lars.run.reading import read_bytes

RULESET = "4.0.0"  # the newest one that still has ResNet-50
TARGET = 75.9  # per cent, top-1
_IMAGENET = (1_281_167, 50_000)
_TOKEN = ":::MLLOG "
_MOST_BYTES = 1 << 24  # of a log that is read: ten thousand evaluations
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)  # of a mangled event


def broken_rules(recipe: Recipe, samples: int, val_samples: int) -> list[str]:
    """What of MLPerf's closed division (ResNet-50, rules of training v4.0) a recipe breaks, one clause each."""
    name, augment, optimizer, schedule = recipe.model.name, recipe.augment, recipe.optimizer, recipe.schedule
    images, sizes = f"{samples:,} + {val_samples:,}", augment.sizes or [recipe.model.image_size]
    more = (augment.randaugment, augment.erase, augment.mixup, augment.cutmix)
    halvings = math.log2(optimizer.weight_decay / 1e-4) if optimizer.weight_decay else math.nan
    rules: list[tuple[bool, str]] = [
        ((samples, val_samples) == _IMAGENET, f"the data are ImageNet's 1,281,167 + 50,000 images, not {images}"),
        (name in ("resnet50", "resnet50_mlperf"), f"the model is ResNet-50, not {name}"),
        (name == "resnet50_mlperf", "the last layer begins with N(0, 0.01), gammas with 1: model.name=resnet50_mlperf"),
        (augment.scale == [0.05, 1.0], f"crops take 5 % of the area at least, not {100 * augment.scale[0]:g} %"),
        ({recipe.model.image_size, *sizes} == {224}, f"images have 224 pixels, not {', '.join(map(str, sizes))}"),
        (augment.label_smoothing == 0.1, f"label smoothing is 0.1, not {augment.label_smoothing:g}"),
        (not any(more), "images are cropped and flipped, nothing else"),
        (halvings.is_integer(), f"weight decay is 1e-4 times a power of two, not {optimizer.weight_decay:g}"),
        (schedule.end_lr == 1e-4, f"the last rate is 1e-4, not {schedule.end_lr:g}"),
        (schedule.power == 2 or optimizer.name == "sgd", f"the rate decays with power 2, not {schedule.power:g}"),
        (schedule.shape == "polynomial", f"the rate decays as a polynomial, not as {schedule.shape}"),
        (schedule.hold_epochs == 0, f"decay begins after warm-up, not {schedule.hold_epochs:g} epochs later"),
        (schedule.warmup_power == 1, f"warm-up is linear, not of power {schedule.warmup_power:g}"),
        (recipe.evaluation.every_epochs in (None, 4), "the run is evaluated every 4 epochs"),
        (optimizer.name in ("sgd", "lars"), f"the optimizer is sgd or lars, not {optimizer.name}"),
    ]
    if optimizer.name == "lars":
        rules += [
            (optimizer.eps == 0, f"LARS has epsilon 0, not {optimizer.eps}"),
            (optimizer.trust_coefficient == 1e-3, f"LARS has eta 0.001, not {optimizer.trust_coefficient}"),
            (not optimizer.adapt_1d, "biases and norm scales are left out of LARS"),
            (optimizer.decay_in_norm is not False, "the trust ratio has weight decay in its denominator"),
        ]
    return [clause for kept, clause in rules if not kept]


class MLLog:
    """Writes the events of one run; on other ranks than 0, and without `mllog=true`, it writes nothing."""

    def __init__(self, recipe: Recipe, plan: BatchPlan, val_samples: int, step: int, writes: bool) -> None:
        """Begin the log, or go on with it after `step`: what came later is cut off, and the clock has gone on."""
        self.block_ends = [*evaluation_epochs(recipe), math.ceil(recipe.epochs)]
        self.plan, self.file, self.running = plan, Path(recipe.run_dir) / "mllog.txt", False
        if not (writes and recipe.mllog):
            return
        from mlperf_logging.mllog import constants
        from mlperf_logging.mllog.mllog import MLLogger

        begun = self._cut_back(step) if step and self.file.is_file() else set()
        if not begun:
            self.file.unlink(missing_ok=True)  # a link would lead out of the folder, and a pipe would wait
        handler = logging.FileHandler(self.file)
        logger = logging.Logger(str(self.file), logging.INFO)  # of its own: nothing else is to write into the file
        logger.addHandler(handler)
        self.keys, self.logger = constants, MLLogger(logger, root_dir=str(Path(__file__).parents[2]))
        self.running = "run_stop" not in begun
        if begun:
            return
        for clause in broken_rules(recipe, plan.samples, val_samples):
            print(f"warning: mllog.txt is not of MLPerf's closed division: {clause}", file=sys.stderr, flush=True)
        self.logger.start(constants.INIT_START, time_ms=int(psutil.Process().create_time() * 1000))
        self.logger.event(constants.CACHE_CLEAR, False)
        for key, value in _facts(recipe, plan, val_samples).items():
            self.logger.event(key, value)
        self.logger.end(constants.INIT_STOP)
        self.logger.start(constants.RUN_START)
        self._block(constants.BLOCK_START, first=1)

    def evaluation(self, step: int, seconds: float, top1: float) -> None:
        """An evaluation after `step` steps that took `seconds` until now; the first at the target ends the run."""
        if not self.running:
            return
        keys, epoch = self.keys, round(step * self.plan.global_batch / self.plan.samples)
        data, ended = {"epoch_num": epoch, "step": step}, int(time.time() * 1000)
        began = ended - int(seconds * 1000)
        first = max((e + 1 for e in self.block_ends if e < epoch), default=1)
        self._block(keys.BLOCK_STOP, first, step, time_ms=began)
        self.logger.start(keys.EVAL_START, metadata=data, time_ms=began)
        self.logger.event(keys.EVAL_ACCURACY, top1 / 100, metadata=data, time_ms=ended)
        self.logger.end(keys.EVAL_STOP, metadata=data, time_ms=ended)
        if top1 >= TARGET or step == self.plan.steps:
            status = keys.SUCCESS if top1 >= TARGET else keys.ABORTED
            self.logger.end(keys.RUN_STOP, metadata={"status": status, "step": step})
            self.running = False
        else:
            self._block(keys.BLOCK_START, epoch + 1, step)

    def _block(self, key: str, first: int, step: int = 0, **when: int) -> None:
        count = next((e for e in self.block_ends if e >= first), first) - first + 1
        write = self.logger.start if key == self.keys.BLOCK_START else self.logger.end
        write(key, metadata={"first_epoch_num": first, "epoch_count": count, "step": step}, **when)

    def _cut_back(self, step: int) -> set[str]:
        """Drop events of later steps and a torn last line; the keys of those that stay."""
        kept = [line for line in self.file.read_text(errors="replace").splitlines(keepends=True) if line.endswith("\n")]
        try:
            kept = [line for line in kept if json.loads(line.removeprefix(_TOKEN))["metadata"].get("step", 0) <= step]
            keys = {json.loads(line.removeprefix(_TOKEN))["key"] for line in kept}
        except _DAMAGE as error:
            raise _damaged(self.file, error) from None
        write_atomically(self.file, "".join(kept))
        return keys


def _facts(recipe: Recipe, plan: BatchPlan, val_samples: int) -> dict[str, Any]:
    """The events before a run's start, by MLPerf's names. `decay_steps` is counted from where the recipe counts it."""
    optimizer, schedule = recipe.optimizer, recipe.schedule
    of_lars = optimizer.name == "lars"
    prefix = "lars_opt" if of_lars else "sgd_opt"
    facts = {
        "submission_benchmark": "resnet",
        "submission_division": "closed",
        "submission_org": "lars-imagenet",
        "submission_platform": f"{plan.processes} processes",
        "submission_status": "research",
        "seed": recipe.seed,
        "global_batch_size": plan.global_batch,
        "gradient_accumulation_steps": plan.passes_per_process,
        "train_samples": plan.samples,
        "eval_samples": val_samples,
        "model_bn_span": plan.bn_group,
        "opt_name": optimizer.name,
        f"{prefix}_base_learning_rate": optimizer.lr,
        f"{prefix}_end_learning_rate": schedule.end_lr,
        f"{prefix}_learning_rate_decay_poly_power": schedule.power,
        f"{prefix}_learning_rate_decay_steps": round(Schedule.of(recipe, plan).decay_steps),
        f"{prefix}_momentum": optimizer.momentum,
        f"{prefix}_weight_decay": optimizer.weight_decay,
        f"{'lars_opt' if of_lars else 'opt'}_learning_rate_warmup_epochs": schedule.warmup_epochs,
    }
    return facts | {"lars_epsilon": optimizer.eps} if of_lars else facts


def seconds_to_target(run: Path) -> float | None:
    """From `run_start` to the evaluation that reached the target; None without a log, or if none reached it."""
    file = run / "mllog.txt"
    lines = (read_bytes(file, _MOST_BYTES) or b"").splitlines(keepends=True)
    try:
        whole = [line for line in lines if line.endswith(b"\n")]  # a crash may have cut the last
        events = [json.loads(line.removeprefix(_TOKEN.encode())) for line in whole]
        times = {event["key"]: float(event["time_ms"]) for event in events}
        reached = any(event["key"] == "run_stop" and event["metadata"]["status"] == "success" for event in events)
        return (times["run_stop"] - times["run_start"]) / 1000 if reached else None
    except _DAMAGE as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> RecipeError:
    return RecipeError(f"{file} is damaged ({type(error).__name__}: {one_line(error)}): remove it")


def _package(module: str, *arguments: str) -> bool:
    """One of the package's commands, its output shown without file names; whether it was content."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"mlperf_logging.{module}", *arguments, "--log_output", f"{folder}/log"]
        return subprocess.run(command).returncode == 0


@refuses(RecipeError)
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    runs = parser.parse_args().runs
    if missing := [str(run) for run in runs if not (run / "mllog.txt").is_file()]:
        raise RecipeError(f"{missing[0]} has no mllog.txt: train it with mllog=true")
    good = True
    for run in runs:
        print(f"{run}: compliance checker, rules of training {RULESET}", flush=True)
        good &= _package("compliance_checker", str(run / "mllog.txt"), "--usage", "training", "--ruleset", RULESET)
    if len(runs) > 1:
        with tempfile.TemporaryDirectory() as folder:
            for number, run in enumerate(runs):
                shutil.copy(run / "mllog.txt", Path(folder, f"result_{number}.txt"))
            print(f"{len(runs)} runs: convergence against the reference points of training {RULESET}", flush=True)
            good &= _package("rcp_checker", folder, "--rcp_version", RULESET)
    return 0 if good else 1
