"""`python -m tests.benchmarks.wall_clock [--json]`: seconds of an epoch of the study's nets against batch.

It is wall-clock of this machine. Each run is a whole one of recipes/train.py over one epoch with its evaluation, on one
process and on two, one after the other. Nothing else may run beside it; the study's own runs train two at a time, so
their seconds say little about this.
The data are the study's, runs/study/data; where they are not there yet, CIFAR-10 comes from the Hub or `--data`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "recipes/study")]
from conftest import ROOT, play  # noqa: E402
from study import RUNS, write_data  # noqa: E402

from lars.recipe.config import RecipeError  # noqa: E402
from lars.run.reading import read_result  # noqa: E402

BATCHES, PROCESSES, IMAGES = (256, 1024, 4096, 16384), (1, 2), 45_000


def measure(model: str, batch: int, processes: int, folder: Path) -> dict:
    """Seconds for as many images as an epoch has: a run's last step may take more of them."""
    run = folder / f"{model}-{batch}-{processes}"
    keys = (
        f"global_batch={batch}",
        f"data.path={RUNS / 'data'}",
        "data.val_split=validation",
        "epochs=1",
        "schedule.warmup_epochs=0",
    )
    free = ("data.workers=1", "runtime.channels_last=true", "trackers=[]", f"run_dir={run}")
    play(processes, ROOT / "recipes/study" / f"{model}.yaml", *keys, *free, log=folder / "log.txt", where="cpu-2")
    result = read_result(run)
    seconds = result["seconds"] * IMAGES / result["images"]
    return {
        "model": model,
        "batch": batch,
        "processes": processes,
        "steps": result["steps"],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--data", default="uoft-cs/cifar10", help="as for recipes/study/study.py")
    args = parser.parse_args()
    try:
        write_data(args.data, RUNS / "data")
    except RecipeError as error:
        parser.error(str(error))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in ("resnet", "alexnet"):
            for batch in BATCHES:
                rows += [measure(model, batch, processes, Path(folder)) for processes in PROCESSES]
    if args.json:
        machine = {"cpu": platform.machine(), "cores": os.cpu_count()}
        print(json.dumps({"machine": machine, "rows": rows}, indent=1))
        return
    for row in rows:
        print(
            f"{row['model']:8s} batch {row['batch']:6,d}, {row['processes']} processes: {row['seconds']:.1f} s an epoch"
        )


if __name__ == "__main__":
    main()
