"""`python recipes/study/study.py [--data DATA] [--jobs N] [--fresh]`: the study of grid.yaml, run by run.

`make study` calls it. It trains what the ledger (recipes/study/results/) does not have; with `--fresh` everything. Stop
it whenever you like: finished runs are kept, unfinished ones resume. Runs go to runs/study/; `summary.py --collect`
puts them into the ledger.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from lars.data.index import resolve
from lars.recipe.keys import Data
from lars.recipe.refusal import RecipeError
from lars.run.reading import diverged, read_result

HERE = Path(__file__).parent
RUNS, RESULTS = Path("runs/study"), HERE / "results"
NETS = {"resnet": "ResNet", "alexnet": "AlexNet"}
TITLES = {  # in the tables' order
    "sgd-linear": "SGD, linear scaling",
    "sgd-sqrt": "SGD, square-root scaling",
    "lars": "LARS",
}
use_ledger = True
_HELD_BACK, _ROWS_PER_FILE, _ROWS_PER_GROUP = 5_000, 5_000, 100
_locks: dict[Path, threading.Lock] = {}


def write_data(source: str, out: Path) -> None:
    """CIFAR-10's own bytes as train (the first 45,000 images), validation (the last 5,000) and test.

    The columns are img and label.
    """
    import datasets
    import pyarrow.parquet as pq

    done = out / "complete"
    if done.exists():
        return
    resolve(Data(path=source, train_split="train", val_split="test"))  # says in one line what is wrong with it
    out.mkdir(parents=True, exist_ok=True)
    loaded = datasets.load_dataset(source)
    test = next(split for split in loaded if split != "train")
    count = len(loaded["train"]) - _HELD_BACK
    parts = {
        "train": loaded["train"].select(range(count)),
        "validation": loaded["train"].select(range(count, count + _HELD_BACK)),
        "test": loaded[test],
    }
    for name, part in parts.items():
        part = part.rename_columns(dict(zip(part.column_names, ("img", "label"))))
        part = part.cast_column("img", datasets.Image(decode=False))
        files = math.ceil(len(part) / _ROWS_PER_FILE)
        for number in range(files):
            rows = part.select(range(number * _ROWS_PER_FILE, min(len(part), (number + 1) * _ROWS_PER_FILE)))
            rows = rows.cast_column("img", datasets.Image())  # the files say that they hold images
            file = out / f"{name}-{number:05d}-of-{files:05d}.parquet"
            pq.write_table(rows.with_format("arrow")[:], file, row_group_size=_ROWS_PER_GROUP)
    done.touch()


def train(model: str, label: str, seed: int, split: str, overrides: list[str]) -> dict[str, Any]:
    """One run to its end, or the one that is there; its result. A run that diverges is a result, too."""
    run = RUNS / model / label / f"seed-{seed}"
    with _locks.setdefault(run, threading.Lock()):  # two methods may want the same rate
        places = [run, RESULTS / run.relative_to(RUNS)] if use_ledger else [run]
        for before in map(read_result, places):
            if before.get("status") == "finished" or diverged(before):
                return before
        free = [f"run_dir={run}", f"data.path={RUNS / 'data'}", "data.workers=1", "trackers=[]", "checkpoint.keep=1"]
        keys = ["runtime.channels_last=true", f"data.val_split={split}", f"seed={seed}", *overrides]
        command = [sys.executable, str(HERE.parent / "train.py"), "--config", str(HERE / f"{model}.yaml"), *free, *keys]
        run.mkdir(parents=True, exist_ok=True)
        with open(run / "log.txt", "a") as log:
            status = subprocess.run(command, stdout=log, stderr=log).returncode
        result = read_result(run)
    if result.get("status") != "finished" and not diverged(result):
        raise RuntimeError(f"{run} ended with status {status}: see {run}/log.txt")
    reached = "diverged" if diverged(result) else f"{result['top1']:.2f}"
    print(f"{run}: top-1 {reached} in {result['seconds']:.0f} s", flush=True)
    return result


def score(result: dict[str, Any]) -> float:
    """Top-1 to choose by; a run that diverged is worse than any."""
    return -1.0 if diverged(result) else result["top1"]


def rates(grid: dict[str, Any], method: str, batch: int, base: float) -> list[float]:
    """The rates that are tried."""
    if batch == grid["base_batch"]:
        return grid["base_rates"][grid["methods"][method]["optimizer"]]
    rule = base * (batch / grid["base_batch"]) ** grid["methods"][method]["exponent"]
    return [multiple * rule for multiple in grid["multiples"]]


def overrides_of(grid: dict[str, Any], method: str, batch: int, rate: float, base: float) -> list[str]:
    """What a run changes of the model's recipe; at the base batch there is nothing to warm up to."""
    keys = [
        f"global_batch={batch}",
        f"optimizer.lr={rate:g}",
        f"schedule.warmup_lr={rate if batch == grid['base_batch'] else base:g}",
    ]
    if grid["methods"][method]["optimizer"] == "sgd":
        keys.append("optimizer.name=sgd")
    return keys


def label_of(grid: dict[str, Any], method: str, batch: int, rate: float) -> str:
    """The name of a run's folder. Two methods that come to the same rate share their runs."""
    return f"{grid['methods'][method]['optimizer']}-b{batch}-lr{rate:g}"


class Study:
    """What the ledger holds of one net, seen through the design."""

    def __init__(self, grid: dict[str, Any], model: str) -> None:
        self.grid, self.model = grid, model
        self.batches = sorted(
            {batch for part in grid["parts"] if part["model"] == model for batch in part.get("batches", [])}
        )

    def seeds(self, label: str) -> list[Path]:
        return sorted((RESULTS / self.model / label).glob("seed-*"))

    def tuned(self, method: str, batch: int) -> dict[float, float] | None:
        """{rate: top-1 on the images held back, -1 if it diverged}, or None while a run is missing."""
        first = self.grid["base_batch"]
        base = 0.0 if batch == first else self.rate(method, first)
        wanted = [] if base is None else rates(self.grid, method, batch, base)
        found = {}
        for rate in wanted:
            runs = self.seeds(f"tuning/{label_of(self.grid, method, batch, rate)}")
            if not runs:
                return None
            found[rate] = score(read_result(runs[0]))
        return found or None

    def rate(self, method: str, batch: int) -> float | None:
        """The rate that was chosen."""
        tuned = self.tuned(method, batch)
        return max(tuned, key=tuned.get) if tuned else None

    def runs(self, method: str, batch: int, change: str = "") -> list[Path]:
        """The test runs at the chosen rate, all of them or none."""
        if (rate := self.rate(method, batch)) is None:
            return []
        label = label_of(self.grid, method, batch, rate)
        runs = self.seeds(f"{label}-{change}" if change else label)
        return runs if len(runs) == len(self.grid["test_seeds"]) else []

    def top1(self, method: str, batch: int, change: str = "") -> list[float]:
        """Of the test runs; a run that diverged has guessed, which is 10 %."""
        results = [read_result(run) for run in self.runs(method, batch, change)]
        return [10.0 if diverged(result) else result["top1"] for result in results]


def tune(grid: dict[str, Any], model: str, method: str, batch: int, base: float) -> float:
    """The best of the rates on the images held back."""
    tried = {}
    for rate in rates(grid, method, batch, base):
        label, overrides = label_of(grid, method, batch, rate), overrides_of(grid, method, batch, rate, base)
        tried[rate] = score(train(model, f"tuning/{label}", grid["tuning_seed"], "validation", overrides))
    return max(tried, key=tried.get)


def entry(grid: dict[str, Any], model: str, method: str, batch: int, base: float) -> None:
    """Tune one method at one batch, then test it with new seeds."""
    rate = tune(grid, model, method, batch, base)
    for seed in grid["test_seeds"]:
        train(model, label_of(grid, method, batch, rate), seed, "test", overrides_of(grid, method, batch, rate, base))


def ablate(grid: dict[str, Any], model: str, name: str, batch: int, base: float, rate: float) -> None:
    label = f"{label_of(grid, 'lars', batch, rate)}-{name}"
    overrides = [*overrides_of(grid, "lars", batch, rate, base), *grid["ablations"][name]]
    for seed in grid["test_seeds"]:
        train(model, label, seed, "test", overrides)


def study(grid: dict[str, Any], jobs: int) -> None:
    """All parts, `jobs` runs at a time."""
    with ThreadPoolExecutor(jobs) as pool:

        def together(calls: Iterator[tuple[Callable, ...]]) -> list[Any]:
            return [future.result() for future in [pool.submit(*call) for call in calls]]

        try:
            for part in grid["parts"]:
                model, first = part["model"], grid["base_batch"]
                sgd, lars = together((tune, grid, model, method, first, math.nan) for method in ("sgd-linear", "lars"))
                base = {"sgd-linear": sgd, "sgd-sqrt": sgd, "lars": lars}
                wanted = [(method, batch) for method in grid["methods"] for batch in part.get("batches", [])]
                wanted = [pair for pair in wanted if pair != ("sgd-sqrt", first)]  # the rules meet there: one SGD
                together((entry, grid, model, method, batch, base[method]) for method, batch in wanted)
                if batch := part.get("ablate"):
                    rate = tune(grid, model, "lars", batch, lars)
                    together((ablate, grid, model, name, batch, lars, rate) for name in grid["ablations"])
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those under way end, no other begins
            raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    places = "CIFAR-10: the Hub's id, or a folder of Parquet with the same two columns"
    parser.add_argument("--data", default="uoft-cs/cifar10", help=places)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one core each")
    parser.add_argument("--fresh", action="store_true", help="train again what the ledger has")
    args = parser.parse_args()
    global use_ledger
    use_ledger = not args.fresh
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        write_data(args.data, RUNS / "data")
        study(yaml.safe_load((HERE / "grid.yaml").read_text()), args.jobs)
    except KeyboardInterrupt:  # it reached the runs as well: they save and stop
        print("stopped: start again to go on", file=sys.stderr)
        return 75
    except (RecipeError, RuntimeError) as error:  # RuntimeError: a run that ended neither finished nor diverged
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, RecipeError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
