"""`python -m lars.ledger RUN...`: put finished runs into the results ledger, recipes/<model>/results/<recipe>/<run>/.

An entry is the proof of a row: `config.yaml` (the resolved recipe, without the paths of one machine), `metrics.jsonl` (every step),
`result.json` (accuracy, hashes, versions, hardware, commit) and `mllog.txt` where there is one. `make tables` writes from it.
"""
from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from omegaconf import OmegaConf

from lars.config import RecipeError
from lars.run import diverged, read_lines, read_result, write_atomically

_OF_ONE_MACHINE = ("run_dir", "data.path", "data.workers")


def complaint(run: Path) -> str | None:
    """Why a run folder is no proof; None if it is one."""
    result = read_result(run)
    if not result:
        return "it has no result.json"
    if result.get("status") != "finished" and not diverged(result):
        return f"it is {result.get('status')}, not finished"
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl", "train")]
    if steps != list(range(1, result["steps"] + 1)):
        return f"metrics.jsonl has {len(steps)} of its {result['steps']} steps"
    evaluations = read_lines(run / "metrics.jsonl", "eval")
    last = (evaluations[-1]["step"], evaluations[-1]["top1"]) if evaluations else None
    if last != (result["steps"], result["top1"]) and not diverged(result):
        return "the last evaluation in metrics.jsonl is not its result"
    if lacking := [key for key in ("versions", "environment", "data_fingerprint", "source_sha256") if not result.get(key)]:
        return f"result.json lacks {', '.join(lacking)}"
    return None


def keep(run: Path, entry: Path) -> None:
    """Copy what proves a run into the ledger.

    Raises:
        RecipeError: the run is not finished, or its files contradict each other.
    """
    if why := complaint(run):
        raise RecipeError(f"{run} is no proof of a row: {why}")
    written = OmegaConf.load(run / "config.yaml")
    for key in _OF_ONE_MACHINE:
        outer, _, inner = key.rpartition(".")
        (OmegaConf.select(written, outer) if outer else written).pop(inner, None)
    entry.mkdir(parents=True, exist_ok=True)
    write_atomically(entry / "config.yaml", OmegaConf.to_yaml(written))
    for name in ("metrics.jsonl", "result.json", "mllog.txt"):
        if (run / name).is_file():
            shutil.copy(run / name, entry / name)


def entries(folder: Path) -> list[Path]:
    """All runs below a folder of the ledger, in order of their paths."""
    return sorted(file.parent for file in folder.rglob("result.json"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    try:
        for run in parser.parse_args().runs:
            model, _, what = str(read_result(run).get("recipe")).partition("/")
            if not what or not Path("recipes", model).is_dir():
                raise RecipeError(f"{run} is no run of a recipe of recipes/<model>/: it names {read_result(run).get('recipe')!r}")
            entry = Path("recipes", model, "results", what, run.resolve().name)
            keep(run, entry)
            print(entry)
    except (RecipeError, json.JSONDecodeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
