"""`lars reproduce RECIPE... [key=value ...]`: check, train or resume, and judge. What `make reproduce-*` calls.

A finished run of the same sources is kept; one of other sources is set aside and trained anew. An unfinished run
resumes, with a warning if sources changed; but one that failed because its numbers were not finite is set aside too
when they changed, since resuming would go on from weights that the old sources spoiled.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from lars.recipe import config
from lars.recipe.launched import environment_of, read_launch
from lars.recipe.refusal import RecipeError, refuses
from lars.report.report import report
from lars.run.folder import set_aside
from lars.run.lock import RunLock
from lars.run.progress import stdout
from lars.run.reading import diverged, read_result
from lars.run.sources import changed_sources, sources


def launch_file(name: str | None) -> Path:
    """The accelerate file called `name` in launch/; without a name all visible GPUs, else two CPU processes.

    Raises:
        RecipeError: there is no such file.
    """
    name = name or ("gpu" if torch.cuda.is_available() else "cpu-2")
    file = Path(name) if name.endswith(".yaml") else Path("launch") / f"{name}.yaml"
    if not file.is_file():
        known = sorted(p.stem for p in Path("launch").glob("*.yaml"))
        raise RecipeError(f"no launch file {file}: there are {', '.join(known)}")
    return file


def processes_of(file: Path, asked: int | None) -> int:
    """The process count: what was asked, else all GPUs where the file does not say `use_cpu`, else the file's own."""
    written = read_launch(file)
    if asked is None and torch.cuda.is_available() and not written.get("use_cpu"):
        return torch.cuda.device_count()
    if asked is None and (type(count := written.get("num_processes")) is not int or count < 1):
        raise RecipeError(f"{file} says num_processes: {count!r}, which is no number of processes: give --nproc")
    return asked or written["num_processes"]


def launch_command(file: Path, processes: int, recipe: Path, overrides: list[str]) -> list[str]:
    """The full `accelerate launch` line."""
    launcher = ["accelerate", "launch", "--config_file", str(file), "--num_processes", str(processes)]
    return [*launcher, "recipes/train.py", "--config", str(recipe), *overrides]


def start(command: list[str], **kwargs) -> subprocess.Popen:
    """Start an `accelerate ...` line with the accelerate of this Python, on the PATH or not."""
    python = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    return subprocess.Popen([*python, *command[1:]], env={**os.environ, "PYTHONUNBUFFERED": "1"}, **kwargs)


def prepare_folder(run: Path, recipe: Path, fresh: bool, say: Callable[[str], None]) -> None:
    """Decide what becomes of an earlier run in `run` before the recipe is started there.

    The recipe's `model.py` has been run: `sources` names what that runs in turn.
    """
    before = read_result(run)
    changed = changed_sources(run, sources(recipe)) if before else []
    spoiled = before.get("status") == "finished" or diverged(before)
    if before and (fresh or changed and spoiled):
        lock = RunLock(run)
        lock.acquire()  # refuses a run that is still being written
        lock.release()
        why = "FRESH=1" if fresh else f"changed since: {', '.join(changed)}"
        say(f"{run}: earlier run set aside as {set_aside(run)} ({why})")
    elif changed:
        files = ", ".join(changed)
        say(f"warning: {run} is unfinished and resumes with changed sources: {files} (FRESH=1 starts over)")


def reproduce(
    recipe: Path, launch: Path, processes: int, overrides: list[str], fresh: bool, say: Callable[[str], None]
) -> tuple[Path, bool]:
    """Train one recipe to its end; its run folder, and whether the launcher ended well, as an old run may lie there.

    Raises:
        RecipeError: the recipe or its data cannot be trained; train.py has said why.
    """
    train = [sys.executable, "recipes/train.py", "--config", str(recipe)]
    check = [*train, "--check", "--processes", str(processes), *overrides]
    if subprocess.run(check, env={**os.environ, **environment_of(launch)}).returncode:
        raise RecipeError(f"{recipe} was not started")
    run = Path(config.load(recipe, overrides).run_dir)
    prepare_folder(run, recipe, fresh, say)
    command = launch_command(launch, processes, recipe, overrides)
    say(shlex.join(command))
    launcher = start(command)
    with suppress(KeyboardInterrupt):  # it has come to the launcher too, which ends once its run is saved
        launcher.wait()
    return run, launcher.wait() == 0


def why_it_ended(run: Path, began: float) -> str:
    """What stopped a run that was started at `began`, for the end of a launcher's many lines."""
    result = read_result(run)
    if (result.get("heartbeat") or 0) < began:
        return "its launcher ended with an error before the run began, see `error:` above the launcher's lines"
    if result["status"] == "preempted":
        return "stopped by a signal: start the same command again to resume"
    return result.get("error", "its launcher ended with an error, see above")


@refuses(RecipeError)
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE | key=value")
    parser.add_argument("--launch", help="a file of launch/, by name")
    parser.add_argument("--nproc", type=int)
    parser.add_argument("--data", help="data.path")
    parser.add_argument("--fresh", action="store_true", help="start over")
    args = parser.parse_args()
    console = stdout()
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    recipes = [Path(r) for r in args.recipes if "=" not in r]
    overrides = [r for r in args.recipes if "=" in r] + ([f"data.path={args.data}"] if args.data else [])
    if not recipes:
        raise RecipeError("no recipe is given: name a file, as recipes/demo/alexnet.yaml")
    began = time.time()
    file = launch_file(args.launch)
    processes = processes_of(file, args.nproc)
    ended = [reproduce(recipe, file, processes, overrides, args.fresh, say) for recipe in recipes]
    runs = [run for run, _ in ended]
    shared = Path(os.path.commonpath([run.parent for run in runs]))
    good = report(runs, shared / "curves.png", console)
    for run, well in ended:
        if not well:
            say(f"error: {run}: {why_it_ended(run, began)}")
    return 0 if good and all(well for _, well in ended) else 1
