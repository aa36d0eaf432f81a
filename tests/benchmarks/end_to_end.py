"""`python -m tests.benchmarks.end_to_end [--json] [--rounds 3]`: whole runs beside those of three usual ways to train.

The same model, photographs, augmentation, precision, number of processes and of decoding processes, one thread each,
in turns and clocked from outside: images/s after three steps, CPU seconds of the run, seconds and CPU seconds to the
first step (launcher included), the most memory of all processes together (PSS), images/s of the evaluation. Ours runs
with its default keys. `page.py` makes docs/speed.md of the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import DEMO, ROOT, accelerate_line, launch_line

from lars.exact.portable import cpu
from lars.run.sources import commit
from tests.benchmarks import photos

RIVALS = ("timm", "torchvision", "accelerate")
WARM = 3  # steps before the clock of the rate starts
# name: model, size, batch of a process, steps
CASES: dict[str, tuple[str, int, int, int]] = {
    "mobilenetv3_small_050 at 128": ("mobilenetv3_small_050", 128, 32, 40),
    "resnet50 at 128": ("resnet50", 128, 32, 8),
    "resnet50 at 224": ("resnet50", 224, 16, 8),
}
IMAGES = 1280  # a tenth is for the evaluation, a number of whole chunks of each process in every case


def ours(case: tuple[str, int, int, int], processes: int, data: Path, run: Path) -> tuple[list[str], Path]:
    """(command, the file that gets a line for each step)."""
    model, size, batch, steps = case
    keys = (
        f"model.name={model}",
        "model.kwargs={}",
        f"model.image_size={size}",
        f"data.path={data / 'parquet'}",
        "data.workers=1",
        "augment.crop=random_resized_crop",
        "augment.scale=[0.08, 1.0]",
        "augment.ratio=[0.75, 1.3333333333333333]",
        "augment.pad=0",
        f"augment.eval_resize={size * 8 // 7}",
        "augment.mean=[123.7, 116.3, 103.5]",
        "augment.std=[58.4, 57.1, 57.4]",
        f"global_batch={batch * processes}",
        f"bn_group={batch}",
        "optimizer.name=sgd",
        "optimizer.lr=0.01",
        "schedule.warmup_epochs=0",
        "schedule.warmup_lr=0",
        "epochs=100",
        "evaluation.every_epochs=100",  # at the end alone, as the others
        f"max_steps={steps}",
        "runtime.portable=false",
        "trackers=[]",
        f"run_dir={run}",
    )
    if processes == 1:
        return [
            sys.executable,
            "recipes/train.py",
            "--config",
            str(DEMO / "resnet50.yaml"),
            *keys,
        ], run / "metrics.jsonl"
    return launch_line(processes, DEMO / "resnet50.yaml", keys), run / "metrics.jsonl"


def rival(peer: str, case: tuple[str, int, int, int], processes: int, data: Path, run: Path) -> tuple[list[str], Path]:
    model, size, batch, steps = case
    words = [peer, "--data", str(data / "folder"), "--model", model, "--lines", str(run / "log")]
    words += ["--size", str(size), "--batch", str(batch), "--steps", str(steps), "--workers", "1"]
    if processes == 1:
        start = [sys.executable]
    elif peer == "accelerate":  # started as its documentation does it, and like ours
        start = accelerate_line(processes)
    else:
        torchrun = ["torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29666"]
        start = [sys.executable, "-m", *torchrun]
    return [*start, "-m", "tests.benchmarks.peers", *words], run / "log"


def tree(process: psutil.Process) -> tuple[float, int]:
    """(CPU seconds, PSS in bytes) of a process and all below it."""
    cpu, memory = 0.0, 0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error):
            times = one.cpu_times()
            cpu += times.user + times.system
            memory += one.memory_full_info().pss
    return cpu, memory


def clock(command: list[str], lines: Path, case: tuple[str, int, int, int], processes: int) -> dict[str, float]:
    """Start a run and look at it from outside until it ends."""
    _, _, batch, steps = case
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    before, started = os.times(), time.perf_counter()
    at: list[float] = []
    found, most, looked = {}, 0, 0.0
    with open(lines.parent.with_suffix(".out"), "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            now = time.perf_counter() - started
            written = lines.read_bytes().count(b"\n") if lines.exists() else 0
            at += [now] * (written - len(at))
            if at and "cpu_to_first_step" not in found:
                found |= {"seconds_to_first_step": at[0], "cpu_to_first_step": tree(seen)[0]}
            if now - looked > 1:
                looked, most = now, max(most, tree(seen)[1])
            time.sleep(0.005)
    after = os.times()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {out.name}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    rate = (steps - WARM) * batch * processes / (at[steps - 1] - at[WARM - 1])
    evaluated = IMAGES // 10 / (at[steps] - at[steps - 1])
    return found | {
        "images_per_second": rate,
        "cpu_seconds_an_image": cpu / (steps * batch * processes),
        "memory": most,
        "evaluated_per_second": evaluated,
    }


def median(rounds: list[dict[str, float]], key: str) -> float:
    return statistics.median(told[key] for told in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON, every round of it")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    machine = {"cpu": cpu()[0], "cores": os.cpu_count(), "torch": version("torch"), "load": os.getloadavg()}
    found: dict[str, Any] = {"machine": machine, "commit": commit(), "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary, "data")
        photos.write(data / "parquet", IMAGES, data / "folder" / "train")
        photos.write(data / "other", IMAGES // 10, data / "folder" / "validation")
        for (name, case), processes in product(CASES.items(), (1, 2)):
            rounds: dict[str, list[dict[str, float]]] = {who: [] for who in ("ours", *RIVALS)}
            for number, who in product(range(args.rounds), rounds):
                run = Path(temporary, f"{name}-{processes}-{number}-{who}".replace(" ", "-"))
                run.mkdir()
                start = ours if who == "ours" else partial(rival, who)
                rounds[who].append(clock(*start(case, processes, data, run), case, processes))
                print(name, processes, who, rounds[who][-1], file=sys.stderr, flush=True)
            found["rows"].append({"case": name, "processes": processes, "rounds": rounds})
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for row in found["rows"]:
        for who, told in row["rounds"].items():
            shown = ", ".join(f"{key} {median(told, key):,.4g}" for key in told[0])
            print(f"{row['case']}, {row['processes']} processes, {who}: {shown}")


if __name__ == "__main__":
    main()
