"""`python recipes/study/study.py [--data DATA] [--jobs N] [--fresh]`: the study of design.yaml, run by run.

`make study` calls it. It trains what the ledger (recipes/study/results/) does not have; with `--fresh` everything. Stop
it whenever you like: a finished run goes into the ledger at once, an unfinished one in runs/study/ resumes.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import design
from design import FIXED, HERE, METHODS, RESULTS, TARGET, Setting

from lars.commands.ledger import keep
from lars.data.index import resolve
from lars.recipe.keys import Data
from lars.recipe.refusal import RecipeError
from lars.run.reading import diverged, read_result

RUNS = Path("runs/study")
PLACES = ("tuning", "test", "target")  # folders of the ledger
_HELD_BACK, _ROWS_PER_FILE, _ROWS_PER_GROUP = 5_000, 5_000, 100
_running: set[subprocess.Popen] = set()


def write_data(source: str, out: Path) -> None:
    """CIFAR-10's own bytes as train (all but the last 5,000 of its training images), validation (those) and test.

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


def train(place: str, setting: Setting, seed: int, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """One run to its end and into the ledger; its result. A run that diverges is a result, too.

    Args:
        place: one of PLACES. The test images are seen by the runs of "test" alone.
    """
    name = Path(place, setting.label, f"seed-{seed}")
    run, split = RUNS / name, "test" if place == "test" else "validation"
    free = [f"run_dir={run}", f"data.path={RUNS / 'data'}", "data.workers=1", "trackers=[]", "checkpoint.keep=1"]
    keys = ["runtime.channels_last=true", f"data.val_split={split}", f"seed={seed}", *setting.overrides(), *overrides]
    recipe = HERE / f"{setting.method}.yaml"
    command = [sys.executable, str(HERE.parent / "train.py"), "--config", str(recipe), *free, *keys]
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "log.txt", "a") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        _running.add(process)
        status = process.wait()
        _running.remove(process)
    result = read_result(run)
    if result.get("status") != "finished" and not diverged(result):
        raise RuntimeError(f"{run} ended with status {status}: see {run}/log.txt")
    keep(run, RESULTS / name)
    reached = "diverged" if diverged(result) else f"top-1 {result['top1']:.2f}"
    print(f"{name}: {reached} after {result['steps']} steps in {result['seconds']:.0f} s", flush=True)
    return result


def fixed_run(place: str, setting: Setting, seed: int) -> None:
    """One run of the part with fixed epochs, unless the ledger has it; it is evaluated once, at its end."""
    if not design.result(place, setting.label, seed):
        epochs = FIXED["epochs"]
        train(place, setting, seed, [f"epochs={epochs}", f"evaluation.every_epochs={epochs}"])


def target_run(setting: Setting, seed: int, steps: int) -> None:
    """One run of the part with a target, at a constant rate, for so many steps, unless the ledger has as many."""
    if not design.has_run(design.target_folder(setting, seed), steps):
        constant = [f"schedule.end_lr={setting.rate:g}", f"epochs={TARGET['rungs'][-1]}", f"max_steps={steps}"]
        train("target", setting, seed, constant)


Together = Callable[[Callable[..., None], Iterable[tuple]], None]


def fixed_epochs(batch: int, together: Together) -> None:
    """Tune every method at one batch by one seed, then the finalists by new ones; test what is chosen."""
    tried = [setting for method in METHODS for setting in design.settings(FIXED, method, batch)]
    together(fixed_run, (("tuning", setting, FIXED["tuning_seed"]) for setting in tried))
    best = [setting for method in METHODS for setting in design.finalists(method, batch)]
    together(fixed_run, (("tuning", setting, seed) for setting in best for seed in FIXED["final_seeds"]))
    chosen = [design.chosen(method, batch) for method in METHODS]
    if edge := [setting.label for setting in chosen if design.at_edge(FIXED, setting)]:
        raise RuntimeError(f"{', '.join(edge)}: at the edge of its rates; widen fixed.rates.{batch} in design.yaml")
    together(fixed_run, (("test", setting, seed) for setting in chosen for seed in FIXED["test_seeds"]))


def steps_to_target(method: str, batch: int, together: Together) -> None:
    """The setting that reaches the target first, by one seed, rung by rung; then the other seeds of it."""
    first, *others = TARGET["seeds"]
    while (rung := design.search(method, batch))[0]:
        missing, steps = rung
        together(target_run, ((setting, first, steps) for setting in missing))
    if (setting := design.fastest(method, batch)) is None:
        return
    if design.at_edge(TARGET, setting):
        raise RuntimeError(f"{setting.label}: at the edge of its rates; widen target.rates.{batch} in design.yaml")
    for epochs in TARGET["rungs"]:
        late = [seed for seed in others if design.reached(design.target_folder(setting, seed)) is None]
        together(target_run, ((setting, seed, design.steps_of(batch, epochs)) for seed in late))


def study(jobs: int) -> None:
    """All parts, `jobs` runs at a time."""
    with ThreadPoolExecutor(jobs) as pool:

        def together(call: Callable[..., None], runs: Iterable[tuple]) -> None:
            for future in [pool.submit(call, *run) for run in runs]:
                future.result()

        try:
            for batch in FIXED["rates"]:
                fixed_epochs(batch, together)
            for batch in TARGET["rates"]:
                for method in METHODS:
                    steps_to_target(method, batch, together)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those under way end, no other begins
            raise


def _terminated(number: int, frame: object) -> None:
    """As a Ctrl-C, which reaches the runs as well: they save and stop."""
    for process in list(_running):
        process.terminate()
    raise KeyboardInterrupt


def main() -> int:
    signal.signal(signal.SIGTERM, _terminated)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    places = "CIFAR-10: the Hub's id, or a folder of Parquet with the same two columns"
    parser.add_argument("--data", default="uoft-cs/cifar10", help=places)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one core each")
    parser.add_argument("--fresh", action="store_true", help="train again what the ledger has: it is emptied first")
    args = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        write_data(args.data, RUNS / "data")
        for place in PLACES if args.fresh else ():
            shutil.rmtree(RESULTS / place, ignore_errors=True)
            shutil.rmtree(RUNS / place, ignore_errors=True)
        study(args.jobs)
    except KeyboardInterrupt:
        print("stopped: start again to go on", file=sys.stderr)
        return 75
    except (RecipeError, RuntimeError) as error:  # RuntimeError: a run that ended neither finished nor diverged
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, RecipeError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
