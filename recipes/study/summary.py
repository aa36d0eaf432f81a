"""`python recipes/study/summary.py [--collect]`: the study's tables and figures from its committed runs.

`make tables` calls it. `--collect` first puts finished runs of runs/study/ into the ledger,
recipes/study/results/<model>/<run>/seed-<n>/.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from scipy import stats

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from figure import draw  # noqa: E402
from study import NETS, RESULTS, RUNS, TITLES, Study  # noqa: E402

from lars.commands.ledger import entries, keep  # noqa: E402
from lars.commands.tables import markdown, mean_and_spread, replace_marked  # noqa: E402
from lars.run.reading import diverged, read_result  # noqa: E402

README = HERE / "README.md"


def gap(ours: list[float], theirs: list[float]) -> str:
    """Mean top-1 less that of others, and Welch's p; nothing where one of them was not run."""
    if not ours or not theirs:
        return ""
    p = stats.ttest_ind(ours, theirs, equal_var=False).pvalue
    return f"{statistics.mean(ours) - statistics.mean(theirs):+.2f} (p = {p:.2g})"


def accuracy_table(study: Study) -> str:
    """Top-1 of every method at every batch, and LARS less the better SGD."""
    rows = []
    for batch in study.batches:
        found = {method: study.top1(method, batch) for method in TITLES}
        sgd = [found[method] for method in ("sgd-linear", "sgd-sqrt") if found[method]]
        cells = [f"{batch:,}"]
        for method, top1 in found.items():
            rate = study.rate(method, batch)
            cells.append(f"{mean_and_spread(top1, 2)} ({rate:g})" if top1 else "")
        rows.append([*cells, gap(found["lars"], max(sgd, key=statistics.mean, default=[]))])
    head = ["batch", *(f"{title}: top-1 % (rate)" for title in TITLES.values()), "LARS less the better SGD"]
    return markdown(head, rows)


def tuning_table(study: Study) -> str:
    """Every tuning run: rate and top-1 on the images held back; the chosen one in bold."""
    rows = []
    for batch in study.batches:
        cells = [f"{batch:,}"]
        for method in TITLES:
            tuned = study.tuned(method, batch) or {}
            best = max(tuned, key=tuned.get, default=None)
            said = []
            for rate, top1 in tuned.items():
                text = f"{rate:g}: diverged" if top1 < 0 else f"{rate:g}: {top1:.2f}"
                said.append(f"**{text}**" if rate == best else text)
            cells.append(", ".join(said))
        rows.append(cells)
    return markdown(["batch", *TITLES.values()], rows)


def ablation_table(study: Study, batch: int) -> str:
    """Each change beside LARS as it is."""
    usual = study.top1("lars", batch)
    rows = [["LARS as it is", "", mean_and_spread(usual, 2), ""]]
    for name, overrides in study.grid["ablations"].items():
        top1 = study.top1("lars", batch, name)
        rows.append([name, f"`{' '.join(overrides)}`", mean_and_spread(top1, 2), gap(top1, usual)])
    return markdown(["change", "override", "top-1 %", "against LARS as it is"], rows)


def pages(grid: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    """The study's page and the repository's, as they have to read."""
    text = README.read_text()
    for model in NETS:
        study = Study(grid, model)
        text = replace_marked(text, f"accuracy-{model}", accuracy_table(study))
        text = replace_marked(text, f"tuning-{model}", tuning_table(study))
    batch = next(part["ablate"] for part in grid["parts"] if "ablate" in part)
    yield README, replace_marked(text, "ablations", ablation_table(Study(grid, "resnet"), batch))
    front = HERE.parents[1] / "README.md"
    yield front, replace_marked(front.read_text(), "study", accuracy_table(Study(grid, "resnet")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", action="store_true", help="put finished runs of runs/study/ into the ledger first")
    if parser.parse_args().collect:
        for run in entries(RUNS):
            if read_result(run).get("status") == "finished" or diverged(read_result(run)):
                keep(run, RESULTS / run.relative_to(RUNS))
    grid = yaml.safe_load((HERE / "grid.yaml").read_text())
    for file, text in pages(grid):
        file.write_text(text)
    for model in NETS:
        if entries(RESULTS / model):
            draw(Study(grid, model), RESULTS / f"{model}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
