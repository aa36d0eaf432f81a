"""`python -m lars.prove RECIPE`: is it the same run at 1, 2 and 4 processes, and after a SIGKILL? One line says so."""
from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from lars.reproduce import launch_command, start
from lars.run import read_result

_FOLDER = Path("runs/prove")


def play(recipe: Path, processes: int, steps: int, run: Path, kill_at: int | None = None) -> str:
    """Train `steps` steps on CPU processes and return what the launcher printed; with `kill_at` one rank is killed.

    The rank dies by SIGKILL as soon as that step stands in metrics.jsonl.
    """
    overrides = [f"run_dir={run}", f"max_steps={steps}", "checkpoint.every_steps=5", "trackers=[]"]
    file = Path("launch/cpu-1.yaml" if processes == 1 else "launch/cpu-2.yaml")
    log = run.with_suffix(".log")
    with open(log, "a") as stream:
        launcher = start(launch_command(file, processes, recipe, overrides), stdout=stream, stderr=subprocess.STDOUT)
        if kill_at:
            _kill_a_rank(launcher, run / "metrics.jsonl", kill_at)
        launcher.wait()
    return log.read_text()


def _kill_a_rank(launcher: subprocess.Popen, metrics: Path, step: int) -> None:
    while launcher.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            children = psutil.Process(launcher.pid).children(recursive=True)
            ranks = [c for c in children if "recipes/train.py" in c.cmdline()]
            if ranks:
                random.choice(ranks).kill()
                return
        time.sleep(0.02)


def last_step(run: Path) -> int:
    """The last whole line of metrics.jsonl; the kill may have cut off the one after it."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return json.loads([line for line in lines if line.endswith("\n")][-1])["step"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    shutil.rmtree(_FOLDER, ignore_errors=True)
    _FOLDER.mkdir(parents=True)
    runs: dict[str, Path] = {}
    for processes in (1, 2, 4):
        run = _FOLDER / f"processes-{processes}"
        print(f"{args.steps} steps of {args.recipe} with {processes} process{'es' * (processes > 1)} ...", flush=True)
        play(args.recipe, processes, args.steps, run)
        runs[f"{processes} process{'es' * (processes > 1)}"] = run
    run, kill_at = _FOLDER / "killed", random.randint(6, args.steps - 5)
    print(f"the same with 2 processes, one of them killed after step {kill_at}, then started again ...", flush=True)
    play(args.recipe, 2, args.steps, run, kill_at)
    if read_result(run).get("status") in ("finished", None):
        print(f"error: the run ended before it could be killed, see {run}.log", file=sys.stderr)
        return 1
    reached = last_step(run)
    if "resuming after step" not in play(args.recipe, 2, args.steps, run):
        print(f"error: the killed run did not resume, see {run}.log", file=sys.stderr)
        return 1
    runs[f"2, killed at step {reached}, resumed"] = run
    results = {name: read_result(run) for name, run in runs.items()}
    hashes = {(r.get("weights_sha256"), r.get("samples_hash")) for r in results.values()}
    same = len(hashes) == 1 and all(r.get("status") == "finished" for r in results.values())
    parts = [f"{name} {(r.get('weights_sha256') or r.get('status', 'no run'))[:8]}…" for name, r in results.items()]
    print("  |  ".join([*parts, "SAME RUN" if same else f"DIFFERENT RUNS, see {_FOLDER}"]))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
