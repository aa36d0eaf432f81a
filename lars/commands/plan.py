"""`lars plan RECIPE CLUSTER [key=value ...]`: how long a recipe takes on a cluster, before anybody pays for it.

CLUSTER is a file of launch/clusters/ (or your own). It prints time, steps, passes, memory, bottleneck, cost, and the
command that starts the run: the launch file and the largest `runtime.micro_batch` that fits. `--json` is for scripts.
`--devices 8,16,64` plans for several numbers of such devices, with one micro_batch for all of them. Nothing is trained
or downloaded. Beside each time stands an interval: 19 of the 25 runs that the model was judged by lay in theirs
(launch/clusters/README.md). Exit status 2, with one line, for what cannot be.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lars.plan.cluster import load_cluster
from lars.plan.plan import make_plan, with_devices
from lars.plan.render import report, sweep_table
from lars.recipe import config
from lars.recipe.refusal import RecipeError, refuses


def _numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


@refuses(RecipeError)
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("cluster", type=Path, metavar="CLUSTER")
    parser.add_argument("--json", action="store_true", help="one object, or a list with --devices")
    parser.add_argument("--devices", type=_numbers, metavar="8,16,...", help="plan for these numbers of devices")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe, as in bn_group=16")
    args = parser.parse_intermixed_args(arguments)
    recipe = config.load(args.recipe, args.overrides)
    cluster = load_cluster(args.cluster)
    clusters = [with_devices(cluster, n) for n in args.devices] if args.devices else [cluster]
    plans = [make_plan(recipe, each, sweep=args.devices or ()) for each in clusters]
    if args.json:
        print(json.dumps([p.as_dict() for p in plans] if args.devices else plans[0].as_dict(), indent=1))
    else:
        print(sweep_table(plans) if args.devices else report(plans[0], args.recipe, args.overrides))
    return 0
