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
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from lars.commands.reproduce import launch_file, processes_of, reproduce
from lars.exact import portable
from lars.optim.key import CORE
from lars.optim.registry import optimizers
from lars.recipe import config
from lars.recipe.keys import Runtime, declared, neutral
from lars.recipe.refusal import RecipeError, refuses
from lars.report.report import committed_top1, expected_interval
from lars.run.reading import RECIPES, flatten_run, is_name, read_lines, read_result

# How far the loss of a step may be moved by rounding, relative to it: sqrt(n) roundings of the unit u (Higham and Mary
# 2019). In float32 (u = 2^-24) each of a path's n = 10^5 additions rounds; in tf32 and bf16 (u = 2^-11, 2^-8) products
# are added in float32, so only the inputs of its 200 layers do.
LOSS_BOUND = {"fp32": 1e5**0.5 * 2.0**-24, "tf32": 200**0.5 * 2.0**-11, "bf16": 200**0.5 * 2.0**-8}

_COMPARED = ("recipe", "status", "steps", "data_fingerprint", "reproducibility", "environment")
_AT_THE_END = ("samples_hash", "weights_sha256", "top1", "top5")  # of a whole run
_WHEN_EVALUATED = ("evaluation.", "mllog")
_TAKEN_TOO = ("runtime.", *_WHEN_EVALUATED)  # free keys; of the bits and of the log

Pair = tuple[dict[str, Any], dict[str, Any]]  # a line of metrics.jsonl of each run, of the same step


def overrides_of(run: Path, recipe_file: Path) -> list[str]:
    """`key=value` for each key of the run that changes it, its bits or its log and is not what the recipe file says.

    Where the data are is not taken from the run.

    Raises:
        RecipeError: the folder has no config.yaml, or a value in it could name a file, an address or a variable.
    """
    if not (ran := flatten_run(run)):
        raise RecipeError(
            f"{run} has no config.yaml: give a run folder, or a committed recipes/<model>/results/<what>/seed-<n>"
        )
    recipe, known = config.flatten(config.load(recipe_file, [])), optimizers()
    entry = known.get(str(ran.get("optimizer.name"))) or known[recipe["optimizer.name"]]
    overrides = []
    for key, one in declared(entry.keys).items():
        if one.metadata["free"] and not key.startswith(_TAKEN_TOO):
            continue
        written = recipe.get(key, neutral(one))
        value = ran.get(key, written if neutral(one) == CORE else neutral(one))  # an older version had fewer keys
        if value == written:
            continue
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


def recipe_of(run: Path, claimed: dict[str, Any]) -> Path:
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
    if other := other_data(claimed, repeated):
        return False, [f"DIFFERENT DATA: {other}"]
    whole = claimed["status"] == repeated["status"] == "finished" and claimed["steps"] == repeated["steps"]
    if whole:
        claimed = read_result(run, (*_AT_THE_END, *_COMPARED))
    if hole := _hole(run, claimed) or _hole(again, repeated):
        return False, [f"NO PROOF: {hole}"]
    steps = min(claimed["steps"], repeated["steps"])
    if steps < min(claimed["steps"], flatten_run(again).get("max_steps") or claimed["steps"]):
        return False, [f"DIFFERENT RUN: it claims {claimed['steps']} steps, its repetition ended after {steps}"]
    pairs = _pairs(run, again, "train", steps)
    if there := _evaluated_elsewhere(run, again, steps if whole else steps - 1):
        why = "which its config.yaml does not tell (a run that was continued after an earlier end may be so)"
        return False, [f"NO PROOF: its log and its repetition are not evaluated alike, first at step {there}, {why}"]
    notes = [] if whole or claimed["steps"] > steps else [f"the run is {claimed['status']}: its end is not compared"]
    if claimed["reproducibility"] == "portable" != repeated["reproducibility"]:
        notes.append(f"the run is portable, this repetition is not: {_why_not_portable(repeated)}")
    length = f"{steps} steps" if whole else f"the first {steps} of {claimed['steps']} steps"
    different = [(a, b) for a, b in (*pairs, *_pairs(run, again, "eval", steps)) if a != b]
    ends = [key for key in _AT_THE_END if whole and claimed[key] != repeated[key]]
    if not different and not ends:
        weights = f", weights {claimed['weights_sha256'][:16]}" if whole else ""
        return True, [*notes, f"SAME RUN: {length}, bit for bit{weights}"]
    reasons = _why_bits_may_differ(run, again, claimed, repeated)
    if not reasons:
        where = f"{', '.join(ends)} differ, the losses do not"
        if different:
            a, b = min(different, key=lambda pair: pair[0]["step"])
            where = f"step {a['step']}: {a} -> {b}"
        return False, [f"DIFFERENT RUN: the numeric environment is the same and the bits are not; {where}"]
    checks = _up_to_rounding(pairs, flatten_run(again)["precision"])
    if whole:
        samples = Check("samples", "samples_hash" not in ends, claimed["samples_hash"])
        checks = [checks[0], samples, *checks[1:], _top1(claimed, repeated)]
    good = all(check.passed for check in checks)
    lines = [f"  {_word(check.passed)}  {check.name}  {check.detail}".rstrip() for check in checks]
    expected = f"other bits are expected ({'; '.join(reasons)}), so up to rounding:"
    return good, [*notes, expected, *lines, f"{_word(good)} up to rounding: {length}"]


def _hole(run: Path, result: dict[str, Any]) -> str:
    """What is wrong with the steps of a log, or nothing. A run that was killed may have logged more than it told."""
    logged, told = [line["step"] for line in read_lines(run / "metrics.jsonl", "train")], result["steps"]
    enough = len(logged) == told or (result["status"] != "finished" and len(logged) > told)
    whole = enough and logged == list(range(1, len(logged) + 1))
    return "" if whole else f"{run / 'metrics.jsonl'} does not have each of {told} steps once"


class Check(NamedTuple):
    name: str
    passed: bool
    detail: str = ""


def _word(passed: bool) -> str:
    return "PASS" if passed else "FAIL"


def other_data(claimed: dict[str, Any], repeated: dict[str, Any]) -> str:
    """How the data of two results differ, or nothing; an older version did not write what the files' bytes hash to."""
    for key, what in (("data_fingerprint", ""), ("content_fingerprint", "other bytes under equal footers, content ")):
        there, here = claimed.get(key), repeated.get(key)
        if there and here and there != here:
            return f"{what}fingerprint {str(there)[:12]} -> {str(here)[:12]}"  # a stranger may write a number
    return ""


def _up_to_rounding(pairs: list[Pair], precision: str) -> list[Check]:
    """What holds for each step, and for the losses before anything but rounding can have moved them."""
    checks = [Check("rates", all(a["lr"] == b["lr"] and a["images"] == b["images"] for a, b in pairs))]
    bound = LOSS_BOUND[precision]
    for name, (a, b) in zip(("loss from the same weights", "loss after one update"), pairs):
        apart = abs(a["loss"] - b["loss"]) / (abs(a["loss"]) or 1.0)
        checks.append(Check(name, apart <= bound, f"{apart:.1e} apart, bound {bound:.1e}"))
    return checks


def _top1(claimed: dict[str, Any], repeated: dict[str, Any]) -> Check:
    """Whether top-1 at the end of a whole run is one that another seed could have."""
    top1, said = repeated["top1"], f"claimed {claimed['top1']:.2f}"
    interval = expected_interval(committed_top1(claimed["recipe"]))
    if interval is None:
        return Check("top-1", True, f"{top1:.2f} %, {said}; no verdict without three committed seeds")
    low, high = interval
    return Check("top-1", low <= top1 <= high, f"{top1:.2f} %, expected {low:.1f} ... {high:.1f}, {said}")


def _pairs(run: Path, again: Path, kind: str, steps: int) -> list[Pair]:
    """Lines of the steps that both have, without what is only speed."""
    there, here = (_by_step(folder, kind) for folder in (run, again))
    return [(there[step], here[step]) for step in sorted(there.keys() & here.keys()) if step <= steps]


def _evaluated_elsewhere(run: Path, again: Path, steps: int) -> int | None:
    """The first step at which one log of two that should be evaluated alike has an evaluation more; None if none."""
    ran, runs = flatten_run(run), flatten_run(again)
    if any(ran.get(key, value) != value for key, value in runs.items() if key.startswith(_WHEN_EVALUATED)):
        return None  # an override of this command said so
    there, here = (
        [e["step"] for e in read_lines(f / "metrics.jsonl", "eval") if e["step"] <= steps] for f in (run, again)
    )
    return min((Counter(there) - Counter(here)) + (Counter(here) - Counter(there)), default=None)


def _by_step(run: Path, kind: str) -> dict[int, dict[str, Any]]:
    lines = read_lines(run / "metrics.jsonl", kind)
    return {line["step"]: {k: v for k, v in line.items() if k != "images_per_second"} for line in lines}


def _why_bits_may_differ(run: Path, again: Path, claimed: dict[str, Any], repeated: dict[str, Any]) -> list[str]:
    """What decides whether bits can match, where it is not the same. A numeric run promises none, even to itself."""
    there, here = claimed["environment"], repeated["environment"]
    promises = (claimed["reproducibility"], repeated["reproducibility"])
    ignored = {"python"}
    if "cpu_flags" not in there:  # older versions did not write them
        ignored |= {"cpu_flags"}
    if promises == ("portable", "portable"):
        ignored |= {"device", "cpu_flags"}
    facts = [(key, there.get(key), here[key]) for key in sorted(here.keys() - ignored)]
    ran, runs = flatten_run(run), flatten_run(again)
    for name, neutral_value in vars(Runtime()).items():
        key = f"runtime.{name}"
        if key != "runtime.hang_seconds":
            facts.append((key, ran.get(key, neutral_value), runs.get(key, neutral_value)))
    facts.append(("reproducibility", "numeric", "bitwise") if "numeric" in promises else ("reproducibility", *promises))
    return [f"{key}: {a} -> {b}" for key, a, b in facts if a != b]


def _why_not_portable(result: dict[str, Any]) -> str:
    if result["reproducibility"] == "numeric":
        return f"{result.get('engine')} promises no bits"
    if "cudnn" in result["environment"]:
        return f"it ran on a GPU, {result['environment']['device']}"
    return portable.excluded() or f"it ran with {result['environment'].get('instructions')}"


@refuses(RecipeError, OSError)
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
    run = _folder(args.run)
    if not read_result(run).get("steps"):
        raise RecipeError(f"{run} holds no run with a step to verify (no result.json, or 0 steps)")
    claimed = read_result(run, _COMPARED)
    if hole := _hole(run, claimed):  # told before hours of training
        raise RecipeError(hole)
    recipe = args.recipe or recipe_of(run, claimed)
    taken = overrides_of(run, recipe)
    keys = [*taken, *([f"data.path={args.data}"] if args.data else []), *args.overrides]
    here = config.load(recipe, keys)
    words = " ".join(taken) or "nothing"
    print(f"recipe {recipe}, its code and its data are those of this machine; of {run}: {words}")
    file = launch_file(args.launch)
    steps = f"max_steps={min(args.steps or claimed['steps'], claimed['steps'])}"
    # A prefix is evaluated where it ends, and the whole run is not: each has its own folder.
    place = Path("runs/verify", f"{here.name}-{hashlib.sha256(json.dumps([*keys, steps]).encode()).hexdigest()[:8]}")
    processes = processes_of(file, args.nproc)
    again, well = reproduce(recipe, file, processes, [*keys, steps, f"run_dir={place}"], False, print)
    good, lines = False, [f"FAIL: {again} did not end well, see above; start again to resume it"]
    if well:
        good, lines = compare(run, again)
    print("\n".join(lines))
    return 0 if good else 1
