"""`lars prove RECIPE`: is it the same run at 1, 2 and 4 processes, and after a SIGKILL? One line says so.

The runs are portable, so their hash is also compared with a committed one, `results/prove.json` beside the recipe:
every x86-64 CPU with AVX2 gives it, with the same versions of what it rests on. `--commit` writes that file. Exit
status 1: the runs are not one run, or not the committed one where nothing but the sources can be the reason.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from lars.commands.reproduce import launch_command, start
from lars.exact import portable
from lars.recipe import config
from lars.recipe.model_file import import_model_file
from lars.recipe.refusal import RecipeError, refuses
from lars.run.folder import write_atomically
from lars.run.reading import read_lines, read_result
from lars.run.sources import source_sha256, sources

_FOLDER = Path("runs/prove")


def play(recipe: Path, processes: int, steps: int, run: Path, kill_at: int | None = None) -> str:
    """Train `steps` steps on CPU processes and return what the launcher printed; with `kill_at` one rank is killed.

    The rank dies by SIGKILL as soon as that step stands in metrics.jsonl.
    """
    keys = ["checkpoint.every_steps=5", "trackers=[]", "runtime.portable=true"]
    overrides = [f"run_dir={run}", f"max_steps={steps}", *keys]
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


def committed_file(recipe: Path) -> Path:
    return recipe.parent / "results" / "prove.json"


def facts(recipe: Path, steps: int, result: dict[str, Any]) -> dict[str, Any]:
    """What `--commit` writes of a run."""
    import_model_file(recipe.parent)  # `sources` names what it runs
    found = {"recipe": result.get("recipe"), "steps": steps, "weights_sha256": result.get("weights_sha256")}
    return found | {"versions": portable.versions(), "source_sha256": source_sha256(sources(recipe))}


def against_the_committed(recipe: Path, steps: int, result: dict[str, Any]) -> tuple[str, bool]:
    """The end of the line, and whether all is as it can be expected here."""
    file = committed_file(recipe)
    ours, theirs = facts(recipe, steps, result), json.loads(file.read_text()) if file.is_file() else {}
    if any(theirs.get(key) != ours[key] for key in ("recipe", "steps")):
        return "SAME RUN", True  # of which none is committed
    if ours["weights_sha256"] == theirs["weights_sha256"]:
        return "SAME RUN, the committed one", True
    there = theirs.get("versions", {})
    other = [
        f"{name} {there.get(name)} -> {here}" for name, here in ours["versions"].items() if there.get(name) != here
    ]
    reasons = [f"versions differ: {', '.join(other)}"] if other else []
    if result.get("reproducibility") != "portable":
        reasons.append(f"this CPU cannot be portable: {portable.excluded() or result.get('reproducibility')}")
    expected = bool(reasons)
    if ours["source_sha256"] != theirs.get("source_sha256"):
        reasons.append(
            "sources changed since it was committed; where they were meant to change the bits, --commit it anew"
        )
    why = "; ".join(reasons) or f"and nothing that is known explains it, see {_FOLDER}"
    return f"SAME RUN, but not the committed one ({why})", expected


@refuses(RecipeError)
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--commit", action="store_true", help="write the hash to results/prove.json beside the recipe")
    args = parser.parse_args()
    config.load(args.recipe, ["runtime.portable=true"])
    if args.steps < 11:
        raise RecipeError(
            f"--steps {args.steps}: give 11 or more, since a run is killed at step 6 or later, 5 before its end"
        )
    shutil.rmtree(_FOLDER, ignore_errors=True)
    _FOLDER.mkdir(parents=True)
    runs: dict[str, Path] = {}
    for processes in (1, 2, 4):
        run = _FOLDER / f"processes-{processes}"
        name = "1 process" if processes == 1 else f"{processes} processes"
        print(f"{args.steps} steps of {args.recipe} with {name} ...", flush=True)
        play(args.recipe, processes, args.steps, run)
        runs[name] = run
    run, kill_at = _FOLDER / "killed", random.randint(6, args.steps - 5)
    print(f"the same with 2 processes, one of them killed after step {kill_at}, then started again ...", flush=True)
    play(args.recipe, 2, args.steps, run, kill_at)
    if read_result(run).get("status") in ("finished", None):
        print(f"error: the run ended before it could be killed, see {run}.log", file=sys.stderr)
        return 1
    reached = read_lines(run / "metrics.jsonl")[-1]["step"]
    if "resuming after step" not in play(args.recipe, 2, args.steps, run):
        print(f"error: the killed run did not resume, see {run}.log", file=sys.stderr)
        return 1
    runs[f"2, killed at step {reached}, resumed"] = run
    results = {name: read_result(run) for name, run in runs.items()}
    hashes = {(r.get("weights_sha256"), r.get("samples_hash")) for r in results.values()}
    same = len(hashes) == 1 and all(r.get("status") == "finished" for r in results.values())
    parts = [f"{name} {(r.get('weights_sha256') or r.get('status', 'no run'))[:8]}…" for name, r in results.items()]
    result = read_result(run)
    if same and args.commit:
        if result["reproducibility"] != "portable":
            print(f"error: not committed, this CPU cannot be portable: {portable.excluded()}", file=sys.stderr)
            return 1
        committed_file(args.recipe).parent.mkdir(exist_ok=True)
        text = json.dumps(facts(args.recipe, args.steps, result), indent=1) + "\n"
        write_atomically(committed_file(args.recipe), text)
    verdict, good = f"DIFFERENT RUNS, see {_FOLDER}", False
    if same:
        verdict, good = against_the_committed(args.recipe, args.steps, result)
    print("  |  ".join([*parts, verdict]))
    return 0 if good else 1
