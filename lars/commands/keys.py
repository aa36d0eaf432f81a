"""`lars keys [RECIPE]`: every key of a recipe, with its neutral value, limit and unit.

With a recipe the keys of its optimizer are shown, also of one that the recipe's own `model.py` registers; without one
those of all optimizers.

    lars keys recipes/demo/alexnet.yaml
"""

from __future__ import annotations

import argparse
import json
from dataclasses import Field
from pathlib import Path

from rich.table import Table

from lars.optim.key import CORE
from lars.recipe import config
from lars.recipe.keys import all_declared, declared, neutral
from lars.recipe.refusal import RecipeError, refuses
from lars.run.progress import stdout


def row(name: str, one: Field) -> tuple[str, ...]:
    """Name, type, neutral value, limits, unit, what may change it, and what it decides."""
    told, value = one.metadata, neutral(one)
    if value == CORE:
        value = "core"
    words = value if isinstance(value, str) else json.dumps(value)
    limit = " or ".join(told["choices"]) or (told["limit"] or "").removeprefix("must ")
    return name, str(one.type), words, limit, told["unit"], "free" if told["free"] else "trajectory", told["what"]


@refuses(RecipeError)
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?")
    args = parser.parse_args()
    if args.recipe:
        known = declared(type(config.load(args.recipe, []).optimizer))
    else:
        known = all_declared()
    table = Table("key", "type", "neutral", "must", "unit", "fixes", "what it decides")
    for name, one in known.items():
        table.add_row(*row(name, one))
    stdout(width=200).print(table)
    print("core: a recipe has to give it. free: it never changes the trajectory and may change when a run is resumed.")
    return 0
