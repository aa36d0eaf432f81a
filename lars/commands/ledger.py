"""`lars ledger RUN...`: put finished runs into the results ledger, recipes/<model>/results/<recipe>/seed-<n>/.

An entry is the proof of a row: `config.yaml` (the resolved recipe, without the paths of one machine), `metrics.jsonl`
(every step), `result.json` (accuracy, hashes, versions, hardware, commit), perhaps `mllog.txt`. `make tables` reads it.
A run that differs from its recipe in anything but the seed, or stopped early, is no entry of that recipe.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import yaml

from lars.commands.verify import other_data
from lars.recipe.refusal import RecipeError, refuses
from lars.report.report import changed_keys, ended_early
from lars.run.folder import write_atomically
from lars.run.reading import RECIPES, diverged, flatten_run, is_name, read_bytes, read_config, read_lines, read_result

_OF_ONE_MACHINE = ("path", "workers")  # keys of data, beside run_dir


def complaint(run: Path) -> str | None:
    """Why a run folder is no proof; None if it is one."""
    result = read_result(run)
    if not result:
        return "it has no result.json"
    if result.get("status") != "finished" and not diverged(result):
        return f"it is {result.get('status')}, not finished"
    needed = ("steps", "epochs", "versions", "environment", "data_fingerprint", "source_sha256")
    if missing := [key for key in needed if result.get(key) in (None, "", {})]:
        return f"result.json lacks {', '.join(missing)}"
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl", "train")]
    if len(steps) != result["steps"] or steps != list(range(1, len(steps) + 1)):
        return f"metrics.jsonl has {len(steps)} of its {result['steps']} steps"
    evaluations = read_lines(run / "metrics.jsonl", "eval")
    last = (evaluations[-1]["step"], evaluations[-1]["top1"]) if evaluations else None
    if last != (result["steps"], result.get("top1")) and not diverged(result):
        return "the last evaluation in metrics.jsonl is not its result"
    if not read_config(run):
        return "it has no config.yaml"
    return None


def other_run(run: Path, recipe_file: Path) -> str | None:
    """Why a run is not one of this recipe; None if only the seed may be another."""
    if not recipe_file.is_file():
        return f"there is no {recipe_file}"
    if keys := changed_keys(run, recipe_file):
        return f"{', '.join(keys[:3])}{', ...' * (len(keys) > 3)} differ from {recipe_file.name}: copy the recipe"
    early = ended_early(run)
    return f"it {early}" if early else None


def other_seeds(run: Path, entry: Path) -> str | None:
    """Why a run cannot stand beside what its row has already; None if it can."""
    mine = read_result(run)
    for other in entry.parent.glob("seed-*"):
        if why := other_data(read_result(other), mine):
            return f"its data are not those of {other} ({why}): a row is of one data set"
    before = read_result(entry)
    if before and any(before.get(key) != mine.get(key) for key in ("weights_sha256", "samples_hash", "steps")):
        return f"{entry} has another run of this seed: move that away first"
    return None


def keep(run: Path, entry: Path) -> None:
    """Copy what proves a run into the ledger, in the place of an entry that is there.

    A reader finds the earlier entry, none or the new one whole, never files of both. If the disk is full the earlier
    one stays; if a crash comes between the two renames, the next call puts it back.

    Raises:
        RecipeError: the run is not finished, or its files contradict each other.
    """
    if why := complaint(run):
        raise RecipeError(f"{run} is no proof of a row: {why}")
    kept = {key: value for key, value in read_config(run).items() if key != "run_dir"}
    if isinstance(data := kept.get("data"), dict):
        kept["data"] = {key: value for key, value in data.items() if key not in _OF_ONE_MACHINE}
    files = {name: read_bytes(run / name) for name in ("metrics.jsonl", "mllog.txt", "result.json")}
    files["config.yaml"] = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).encode()
    beside = _tidy(entry)
    new = beside / "new"
    new.mkdir(parents=True)
    try:
        for name, content in files.items():
            if content is not None:
                write_atomically(new / name, content)
        if entry.exists():  # POSIX renames a folder onto none but an empty one
            os.rename(entry, beside / "before")
        os.rename(new, entry)
    finally:
        _tidy(entry)


def _tidy(entry: Path) -> Path:
    """Put back an entry that was moved away for one that never came; where entries are made, beside it, now empty."""
    beside = entry.with_name(f".{entry.name}")
    if (beside / "before").exists() and not entry.exists():
        os.rename(beside / "before", entry)
    shutil.rmtree(beside, ignore_errors=True)
    return beside


@refuses(RecipeError, OSError)
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    for run in parser.parse_args().runs:
        name = read_result(run).get("recipe")
        model, _, what = name.partition("/") if is_name(name) else ("", "", "")
        if not model or not (RECIPES / model).is_dir():
            raise RecipeError(f"{run} is no run of a recipe of recipes/<model>/: it names {name!r}")
        seed = flatten_run(run).get("seed")
        if type(seed) is not int or seed < 0:  # a name of a folder here, and a stranger's word
            raise RecipeError(f"{run} is no run of a recipe: its config.yaml has seed: {str(seed)[:40]!r}")
        entry = RECIPES / model / "results" / what / f"seed-{seed}"
        _tidy(entry)
        if why := complaint(run) or other_run(run, RECIPES / f"{name}.yaml") or other_seeds(run, entry):
            raise RecipeError(f"{run} is no proof of {name}: {why}")
        keep(run, entry)
        print(os.path.relpath(entry))
    return 0
