"""`lars tables`: write the README's tables from recipes, `published.yaml`, the plan and the results ledger.

What `make tables` calls, with `recipes/study/summary.py`; a test fails where a page says otherwise. A row that was not
run has an empty cell.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from lars.plan.cluster import load_cluster
from lars.plan.plan import make_plan, with_devices
from lars.recipe import config
from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe
from lars.recipe.refusal import RecipeError, refuses
from lars.report.groups import mean_and_spread
from lars.report.report import committed_top1
from lars.run.folder import write_atomically

CLUSTER = Path("launch/clusters/h100-8.yaml")
DEVICES = (1, 8)
MODELS = {"AlexNet": "alexnet", "ResNet-50": "resnet50"}  # and their folders
IN_THE_README = {
    "alexnet/lars-b32k-100ep": "",
    "resnet50/lars-b32k-90ep": "",
    "resnet50/lars-b32k-64ep": "",
    "resnet50/sgd-b256-90ep": "",
    "resnet50/sgd-b32k-90ep": ", the control without LARS",
    "demo/alexnet": "",
    "demo/resnet50": "",
}
_ORDER = ("sgd", "lars", "ffcv", "nus", "mlperf")  # of a folder's rows


@dataclass(frozen=True)
class Prediction:
    """Of one recipe on so many H100."""

    micro_batch: int
    hours: float


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; an empty cell stays visibly empty."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_marked(text: str, name: str, table: str) -> str:
    """A page with `table` between `<!-- name... -->` and `<!-- end of name -->`.

    Raises:
        ValueError: the page has no such place.
    """
    start = text.index(f"<!-- {name}:")
    start = text.index("-->\n", start) + 4
    return text[:start] + table + "\n" + text[text.index(f"<!-- end of {name} -->", start) :]


def published_text(row: dict) -> str:
    """What others published for a recipe: its row of `published.yaml`, or nothing."""
    if not row:
        return "none"
    if "reach" in row:
        return f"{row['reach']} after {min(row['epochs'])} to {max(row['epochs'])} epochs"
    return f"{row['top1']}" + (" (control)" if row.get("control") else "")


def recipes_of(folder: Path) -> list[Recipe]:
    """All recipes of a folder, SGD first, then by whose they are, then by batch."""
    loaded = [config.load(file, []) for file in sorted(folder.glob("*.yaml"))]
    return sorted(loaded, key=lambda r: (_ORDER.index(Path(r.name).name.split("-")[0]), r.global_batch, r.name))


def predict(recipe: Recipe) -> list[Prediction]:
    """What `lars.plan.plan` says for 1 and for 8 H100."""
    plans = [make_plan(recipe, with_devices(load_cluster(CLUSTER), devices)) for devices in DEVICES]
    return [Prediction(plan.batch.micro_batch, plan.seconds / 3600) for plan in plans]


def row_of(recipe: Recipe, published: dict, predictions: list[Prediction]) -> list[str]:
    """One line of a folder's table."""
    stem = Path(recipe.name).name
    cells = [f"[{stem}]({stem}.yaml)", f"{recipe.global_batch:,}", f"{recipe.epochs:g}", str(recipe.bn_group or "")]
    cells += [published_text(published.get(recipe.name, {})), mean_and_spread(committed_top1(recipe.name))]
    cells.append(f"up to {BatchPlan.of(recipe, recipe.global_batch, 1).passes:,}")
    for planned in predictions:
        digits = 1 if planned.hours < 10 else 0
        cells.append(f"{planned.micro_batch}, {planned.hours:.{digits}f} h")
    return cells


def folder_table(folder: Path, predictions: dict[str, list[Prediction]]) -> str:
    """The table of recipes/<model>/README.md."""
    published = yaml.safe_load(Path("recipes/published.yaml").read_text())
    head = ["recipe", "batch", "epochs", "batch-norm group", "published top-1 %", "ours top-1 %", "GPUs"]
    head += [f"{n} x H100" for n in DEVICES]
    return markdown(head, [row_of(recipe, published, predictions[recipe.name]) for recipe in recipes_of(folder)])


def results_table() -> str:
    """The README's: the paper's rows, the control, and what was run here."""
    published = yaml.safe_load(Path("recipes/published.yaml").read_text())
    rows = []
    for name, remark in IN_THE_README.items():
        folder, stem = name.split("/")
        recipe, results = config.load(f"recipes/{name}.yaml", []), committed_top1(name)
        row = published.get(name, {})
        said = f"{row['top1']} ({row['source']})" if row else ""
        log = f"[results](recipes/{folder}/results/{stem})" if results else ""
        seeds = str(len(results)) if results else ""
        cells = [f"[{name}](recipes/{name}.yaml){remark}", f"{recipe.global_batch:,}", f"{recipe.epochs:g}"]
        rows.append([*cells, said, mean_and_spread(results), seeds, log])
    every = [recipe for folder in MODELS.values() for recipe in recipes_of(Path("recipes", folder))]
    batches = [recipe.global_batch for recipe in every if recipe.name not in IN_THE_README]
    links = ", ".join(f"[{title}](recipes/{folder}/README.md)" for title, folder in MODELS.items())
    more, sizes = f"{len(batches)} more: {links}", f"{min(batches):,} to {max(batches):,}"
    sources = "You et al., NUS-HPC, MLPerf, FFCV"
    rows.insert(5, [more, sizes, "", sources, "", "", ""])  # after the paper's, before the demo's
    return markdown(["recipe", "batch", "epochs", "published top-1 %", "ours top-1 %", "seeds", "log"], rows)


def pages(predictions: dict[str, list[Prediction]]) -> Iterator[tuple[Path, str]]:
    """Every page with tables of ours, as it has to read."""
    yield Path("README.md"), replace_marked(Path("README.md").read_text(), "results", results_table())
    for model in MODELS.values():
        file = Path("recipes", model, "README.md")
        yield file, replace_marked(file.read_text(), "rows", folder_table(file.parent, predictions))


@refuses(RecipeError, OSError)
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    recipes = [recipe for folder in MODELS.values() for recipe in recipes_of(Path("recipes", folder))]
    for file, text in pages({recipe.name: predict(recipe) for recipe in recipes}):
        changed = text != file.read_text()
        write_atomically(file, text)
        print(f"{file}: {'written' if changed else 'as it was'}")
    return 0
