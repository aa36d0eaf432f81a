"""`python -m tests.recipes.sources_page`: docs/sources.md, what each recipe's source says beside what we run.

`recipes/sources.yaml` has the values by recipe and key, each with the file, commit and line in which it was read;
MLPerf's reference points are parsed from the installed `mlperf-logging`. A value that a recipe runs otherwise needs a
reason there.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlperf_logging
import yaml

from lars.recipe import config
from lars.recipe.keys import fixing
from lars.recipe.model_file import import_model_file

ROOT = Path(__file__).parents[2]
PAGE, FILE = ROOT / "docs/sources.md", ROOT / "recipes/sources.yaml"
POINTS = "rcp_checker/training_4.0.0/rcps_resnet.json"
MLPERF = {  # key: of the reference points, which are parsed
    "optimizer.lr": "opt_base_learning_rate",
    "optimizer.momentum": "opt_momentum",
    "optimizer.weight_decay": "opt_weight_decay",
    "bn_group": "model_bn_span",
    "schedule.warmup_epochs": "opt_learning_rate_warmup_epochs",
    "schedule.decay_steps": "opt_learning_rate_decay_steps",
}
HEAD = """# What does each recipe's source say, and what do we run?

Written by `python -m tests.recipes.sources_page` from [recipes/sources.yaml](../recipes/sources.yaml) and the installed
`mlperf-logging` {version}. A line for each key of which a source says something; what we run otherwise has its reason.
A number in brackets is the line in the file at its commit; the files stand at the end. `resnet50/lars-b32k-64ep` and
`resnet50/lars-b32k-90ep-bn16` are not here: no source at hand prints the paper's numbers for them, and their headers
say whose were taken.
"""


class Said(NamedTuple):
    """What a source says of one key, in its own words, and as a value of ours where it can be one."""

    said: str
    where: str
    value: Any = None


@cache
def written() -> dict[str, Any]:
    """recipes/sources.yaml."""
    return yaml.safe_load(FILE.read_text())


@cache
def keys_of(recipe: str) -> dict[str, Any]:
    """Every key of a recipe, flat."""
    return config.flatten(config.load(ROOT / f"recipes/{recipe}.yaml", []))


def said_by_sources() -> dict[str, dict[str, Said]]:
    """{recipe: {key: what is said of it}}."""
    found = {
        recipe: {
            key: Said(str(one["said"]), f"{one['source']} ({one['line']})", one.get("value"))
            for key, one in keys.items()
        }
        for recipe, keys in written()["recipes"].items()
    }
    points = json.loads((Path(mlperf_logging.__file__).parent / POINTS).read_text())
    for recipe, keys in found.items():
        if recipe.startswith("resnet50/mlperf-"):
            batch = keys_of(recipe)["global_batch"]
            numbers = points[f"resnet_ref_{batch}"]["Hyperparams"]
            parsed = {key: Said(f"{numbers[name]:g}", POINTS, numbers[name]) for key, name in MLPERF.items()}
            found[recipe] = {"global_batch": Said(f"{batch:,}", POINTS, batch), **parsed, **keys}
    return found


def same(said: Any, ours: Any) -> bool:
    """Equal, or equal to six digits, as sources print them."""
    if isinstance(said, list) and isinstance(ours, list):
        return len(said) == len(ours) and all(map(same, said, ours))
    numbers = [type(value) in (int, float) for value in (said, ours)]
    return abs(said - ours) <= 1e-6 * max(abs(said), abs(ours)) if all(numbers) else said == ours


def differences() -> dict[tuple[str, str], str]:
    """{(recipe, key): its reason, or ""} of what we run otherwise than a source says."""
    reasons, found = written()["reasons"], {}
    for recipe, keys in said_by_sources().items():
        for key, one in keys.items():
            if key in keys_of(recipe) and not same(one.value, keys_of(recipe)[key]):
                texts = [r["why"] for r in reasons if key in r["keys"] and any(map(recipe.startswith, r["recipes"]))]
                found[recipe, key] = texts[0] if texts else ""
    return found


def page() -> str:
    """The text of docs/sources.md."""
    files, lines = written()["sources"], [HEAD.format(version=version("mlperf-logging"))]
    different = differences()
    for recipe, keys in said_by_sources().items():
        lines += [f"\n## {recipe}\n", "| key | source | ours | reason | read in |", "| --- | --- | --- | --- | --- |"]
        for key, one in keys.items():
            value, reason = keys_of(recipe).get(key, ""), different.get((recipe, key), "")
            lines.append(f"| {key} | {one.said} | {value} | {reason} | {one.where} |")
        silent = [key for key in fixing(keys_of(recipe)) if key not in keys]
        lines.append(f"\nIts source says nothing of {', '.join(f'`{key}`' for key in silent)}.")
    lines.append("\n## Files\n\n| name | repository | file | commit |\n| --- | --- | --- | --- |")
    lines += [f"| {n} | {f['repository']} | {f['file']} | {f['commit'][:12]} |" for n, f in files.items()]
    lines.append(f"| {POINTS} | mlperf-logging {version('mlperf-logging')} | | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    for folder in ("alexnet", "resnet50"):
        import_model_file(ROOT / "recipes" / folder)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
