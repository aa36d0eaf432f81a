"""`lars verify RUN [--steps N] [key=value ...]`: train a run again and say whether it is the same run.

RUN is a run folder, or a committed result by its name, as in demo/alexnet/seed-0: `config.yaml` (recipe and runtime
keys), `metrics.jsonl`, `result.json`. It may be a stranger's: code, recipe and data are those of this repository
(`--recipe`, `--data`), and of RUN only numbers and plain words are taken, which are printed. With `--steps` only a
prefix is trained. Three answers:

- SAME RUN: every loss, evaluation and hash has the same bits.
- DIFFERENT RUN, exit status 1: the numeric environments match and the bits do not; the first different step is named.
- PASS or FAIL up to rounding, where the environments differ: same samples and rates, losses of the first two steps
  (from the same weights, and after one update) within rounding, final top-1 as seeds give it (`lars.report.report`).

Between two portable runs the CPU is no difference: there it is SAME or DIFFERENT RUN, whoever made the CPUs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from lars.commands.reproduce import launch_file, processes_of, reproduce
from lars.exact import portable
from lars.optim.key import CORE
from lars.optim.registry import optimizers
from lars.recipe import config
from lars.recipe.keys import Runtime, declared, neutral
from lars.recipe.model_file import import_model_file
from lars.recipe.refusal import RecipeError
from lars.report.report import committed_top1, expected_interval
from lars.run.reading import RECIPES, flatten_run, is_name, read_lines, read_result

# How far the loss of a step may be moved by rounding, relative to it: sqrt(n) roundings of the unit u (Higham and Mary
# 2019). In float32 (u = 2^-24) each of a path's n = 10^5 additions rounds; in tf32 and bf16 (u = 2^-11, 2^-8) products
# are added in float32, so only the inputs of its 200 layers do.
LOSS_BOUND = {"fp32": 1e5**0.5 * 2.0**-24, "tf32": 200**0.5 * 2.0**-11, "bf16": 200**0.5 * 2.0**-8}


_COMPARED = ("recipe", "status", "steps", "data_fingerprint", "reproducibility", "environment")


def overrides_of(run: Path, recipe_file: Path) -> list[str]:
    """`key=value` for each key of the run that changes it or its bits and is not what the recipe file says.

    Where the data are is not taken from the run.

    Raises:
        RecipeError: the folder has no config.yaml, or a value in it could name a file, an address or a variable.
    """
    if not (ran := flatten_run(run)):
        raise RecipeError(
            f"{run} has no config.yaml: give a run folder, or a committed recipes/<model>/results/<what>/seed-<n>"
        )
    import_model_file(recipe_file.parent)
    recipe, known = config.flatten(config.load(recipe_file, [])), optimizers()
    entry, overrides = known.get(str(ran.get("optimizer.name"))) or known[recipe["optimizer.name"]], []
    for key, one in declared(entry.keys).items():
        if one.metadata["free"] and not key.startswith("runtime."):
            continue
        written = recipe.get(key, neutral(one))
        value = ran.get(key, written if neutral(one) == CORE else neutral(one))  # an older version had fewer keys
        if value != written:
            if not _is_harmless(value):
                raise RecipeError(
                    f"{run / 'config.yaml'}: {key} is not taken from a run folder, since it could name a file, an "
                    f"address or a variable ({str(value)[:60]!r}): give your copy of its recipe with --recipe"
                )
            overrides.append(f"{key}={json.dumps(value)}")
    return overrides


def _is_harmless(value: Any) -> bool:
    """Numbers and plain words; of the arguments of a model none by which timm loads weights."""
    if isinstance(value, dict):
        names = all(re.fullmatch(r"(?!pretrained|checkpoint|cache)[A-Za-z]\w*", key) for key in value)
        return names and all(map(_is_harmless, value.values()))
    if isinstance(value, list):
        return all(map(_is_harmless, value))
    return not isinstance(value, str) or bool(re.fullmatch(r"[\w-][\w.-]*", value))


def _folder(run: Path) -> Path:
    """A run folder, or the committed result of this name."""
    model, *rest = run.parts or [""]
    committed = RECIPES / model / "results" / Path(*rest)
    return committed if not run.exists() and is_name(str(run)) and committed.is_dir() else run


def _recipe_of(run: Path, claimed: dict[str, Any]) -> Path:
    """This repository's recipe of the name that the run gives."""
    file = RECIPES / f"{claimed['recipe']}.yaml"
    if not is_name(claimed["recipe"]) or not file.is_file():
        raise RecipeError(
            f"{run} is of the recipe {claimed['recipe']!r}, none of {RECIPES}: give your copy of it with --recipe"
        )
    return Path(os.path.relpath(file))


def compare(run: Path, again: Path) -> tuple[bool, list[str]]:
    """Is `again`, a repetition of `run` or of its first steps, the same? The verdict, and lines that say why."""
    claimed, repeated = read_result(run, _COMPARED), read_result(again, _COMPARED)
    if claimed["data_fingerprint"] != repeated["data_fingerprint"]:
        return False, [
            f"DIFFERENT DATA: fingerprint {claimed['data_fingerprint'][:12]} -> {repeated['data_fingerprint'][:12]}"
        ]
    contents = [result.get("content_fingerprint") for result in (claimed, repeated)]
    if all(contents) and contents[0] != contents[1]:
        return False, [
            "DIFFERENT DATA: other bytes under equal footers, content fingerprint "
            f"{contents[0][:12]} -> {contents[1][:12]}"
        ]
    steps = min(claimed["steps"], repeated["steps"])
    note = []
    if claimed["reproducibility"] == "portable" != repeated["reproducibility"]:
        note = [f"the run is portable, this repetition is not: {_why_not_portable(repeated)}"]
    whole = claimed["status"] == repeated["status"] == "finished" and claimed["steps"] == repeated["steps"]
    if whole:
        claimed = read_result(run, ("samples_hash", "weights_sha256", "top1", "top5", *_COMPARED))
    pairs = _pairs(run, again, "train", steps)
    if len(pairs) < steps:
        return False, [f"NO PROOF: metrics.jsonl has {len(pairs)} of the {steps} steps"]
    different = [(a, b) for a, b in (*pairs, *_pairs(run, again, "eval", steps)) if a != b]
    hashes = [k for k in ("samples_hash", "weights_sha256", "top1", "top5") if whole and claimed[k] != repeated[k]]
    length = f"{steps} steps" if whole else f"the first {steps} of {claimed['steps']} steps"
    if not different and not hashes:
        weights = f", weights {claimed['weights_sha256'][:16]}" if whole else ""
        return True, [*note, f"SAME RUN: {length}, bit for bit{weights}"]
    reasons = [f"{k}: {a} -> {b}" for k, a, b in _environment(run, again) if a != b]
    first = min(different, key=lambda pair: pair[0]["step"], default=None)
    where = (
        f"step {first[0]['step']}: {first[0]} -> {first[1]}"
        if first
        else f"{', '.join(hashes)} differ, the losses do not"
    )
    if not reasons:
        return False, [f"DIFFERENT RUN: the numeric environment is the same and the bits are not; {where}"]
    lines = [*note, f"other bits are expected ({'; '.join(dict.fromkeys(reasons))}), so up to rounding:"]
    bound = LOSS_BOUND[flatten_run(again)["precision"]]
    checks = [("rates", all(a["lr"] == b["lr"] and a["images"] == b["images"] for a, b in pairs), "")]
    if whole:
        checks.append(("samples", "samples_hash" not in hashes, claimed["samples_hash"]))
    for name, (a, b) in zip(("loss from the same weights", "loss after one update"), pairs):
        apart = abs(a["loss"] - b["loss"]) / (abs(a["loss"]) or 1.0)
        checks.append((name, apart <= bound, f"{apart:.1e} apart, bound {bound:.1e}"))
    interval = expected_interval(committed_top1(claimed["recipe"]))
    if whole and interval:
        inside = interval[0] <= repeated["top1"] <= interval[1]
        found = f"{repeated['top1']:.2f} %, expected {interval[0]:.1f} ... {interval[1]:.1f}"
        checks.append(("top-1", inside, f"{found}, claimed {claimed['top1']:.2f}"))
    elif whole:
        found = f"{repeated['top1']:.2f} %, claimed {claimed['top1']:.2f}"
        checks.append(("top-1", True, f"{found}; no verdict without three committed seeds"))
    good = all(passed for _, passed, _ in checks)
    lines += [f"  {'PASS' if passed else 'FAIL'}  {name}  {detail}".rstrip() for name, passed, detail in checks]
    return good, [*lines, f"{'PASS' if good else 'FAIL'} up to rounding: {length}"]


def _pairs(run: Path, again: Path, kind: str, steps: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Lines of the steps that both have, without what is only speed."""
    both = []
    for folder in (run, again):
        lines = read_lines(folder / "metrics.jsonl", kind)
        both.append(
            {x["step"]: {k: v for k, v in x.items() if k != "images_per_second"} for x in lines if x["step"] <= steps}
        )
    return [(both[0][step], both[1][step]) for step in sorted(both[0].keys() & both[1].keys())]


def _environment(run: Path, again: Path) -> list[tuple[str, Any, Any]]:
    """(what, there, here) of all that decides whether bits can match. A numeric run promises none, even to itself."""
    claimed, repeated = read_result(run), read_result(again)
    promises = (claimed["reproducibility"], repeated["reproducibility"])
    # Older versions did not write the CPU's flags.
    ignored = {"python"} | (set() if "cpu_flags" in claimed["environment"] else {"cpu_flags"})
    ignored |= {"device", "cpu_flags"} if promises == ("portable", "portable") else set()
    keys = sorted(repeated["environment"].keys() - ignored)
    rows = [(k, claimed["environment"].get(k), repeated["environment"].get(k)) for k in keys]
    runtime = {f"runtime.{key}": value for key, value in vars(Runtime()).items()}
    there, here = (runtime | flatten_run(folder) for folder in (run, again))
    rows += [(key, there[key], here[key]) for key in runtime if key != "runtime.hang_seconds"]
    if "numeric" not in promises:
        return [*rows, ("reproducibility", *promises)]
    return rows + [("reproducibility", promise, "bitwise") for promise in promises if promise == "numeric"]


def _why_not_portable(result: dict[str, Any]) -> str:
    if result["reproducibility"] == "numeric":
        return f"{result.get('engine')} promises no bits"
    if "cudnn" in result["environment"]:
        return f"it ran on a GPU, {result['environment']['device']}"
    return portable.excluded() or f"it ran with {result['environment'].get('instructions')}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--recipe", type=Path, help="its recipe's file (default: recipes/<name>.yaml)")
    parser.add_argument("--data", help="data.path (default: the recipe's)")
    parser.add_argument("--steps", type=int, help="train only so many steps (default: as many as RUN has)")
    parser.add_argument("--launch", help="a file of launch/, by name (default: all GPUs, else cpu-2)")
    parser.add_argument("--nproc", type=int, help="processes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in data.path=FOLDER")
    args = parser.parse_intermixed_args(arguments)
    try:
        run = _folder(args.run)
        claimed = read_result(run)
        if not claimed.get("steps"):
            raise RecipeError(f"{run} holds no run with a step to verify (no result.json, or 0 steps)")
        claimed = read_result(run, _COMPARED)
        read_lines(run / "metrics.jsonl")  # damage is told before hours of training
        recipe = args.recipe or _recipe_of(run, claimed)
        taken = overrides_of(run, recipe)
        keys = [*taken, *([f"data.path={args.data}"] if args.data else []), *args.overrides]
        here = config.load(recipe, keys)
        words = " ".join(taken) or "nothing"
        print(f"recipe {recipe}, its code and its data are those of this machine; of {run}: {words}")
        place = Path("runs/verify", f"{here.name}-{hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:8]}")
        file = launch_file(args.launch)
        steps = f"max_steps={min(args.steps or claimed['steps'], claimed['steps'])}"
        processes = processes_of(file, args.nproc)
        again, well = reproduce(recipe, file, processes, [*keys, steps, f"run_dir={place}"], False, print)
        good, lines = False, [f"FAIL: {again} did not end well, see above; start again to resume it"]
        if well:
            good, lines = compare(run, again)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
