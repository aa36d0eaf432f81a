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

from figure import NETS, TITLES, draw  # noqa: E402
from study import RESULTS, RUNS, label_of, rates, score  # noqa: E402

from lars.commands.ledger import entries, keep  # noqa: E402
from lars.commands.tables import markdown, mean_and_spread, replace_marked  # noqa: E402
from lars.run.reading import diverged, read_result  # noqa: E402

README = HERE / "README.md"


class Study:
    """What the ledger holds of one net, seen through the design."""

    def __init__(self, grid: dict[str, Any], model: str) -> None:
        self.grid, self.model = grid, model
        self.batches = sorted(
            {batch for part in grid["parts"] if part["model"] == model for batch in part.get("batches", [])}
        )

    def seeds(self, label: str) -> list[Path]:
        return sorted((RESULTS / self.model / label).glob("seed-*"))

    def tuned(self, method: str, batch: int) -> dict[float, float] | None:
        """{rate: top-1 on the images held back, -1 if it diverged}, or None while a run is missing."""
        if batch == self.grid["base_batch"]:
            wanted = rates(self.grid, method, batch, 0.0)
        else:
            base = self.rate(method, self.grid["base_batch"])
            wanted = rates(self.grid, method, batch, base) if base else []
        found = {}
        for rate in wanted:
            runs = self.seeds(f"tuning/{label_of(self.grid, method, batch, rate)}")
            if not runs:
                return None
            found[rate] = score(read_result(runs[0]))
        return found or None

    def rate(self, method: str, batch: int) -> float | None:
        """The rate that was chosen."""
        tuned = self.tuned(method, batch)
        return max(tuned, key=tuned.get) if tuned else None

    def runs(self, method: str, batch: int, change: str = "") -> list[Path]:
        """The test runs at the chosen rate, all of them or none."""
        rate = self.rate(method, batch)
        runs = self.seeds(label_of(self.grid, method, batch, rate) + (f"-{change}" if change else "")) if rate else []
        return runs if len(runs) == len(self.grid["test_seeds"]) else []

    def top1(self, method: str, batch: int, change: str = "") -> list[float]:
        """Of the test runs; a run that diverged has guessed, which is 10 %."""
        results = [read_result(run) for run in self.runs(method, batch, change)]
        return [10.0 if diverged(result) else result["top1"] for result in results]


def accuracy_table(study: Study) -> str:
    """Top-1 of every method at every batch, and LARS less the better SGD."""
    rows = []
    for batch in study.batches:
        found = {method: study.top1(method, batch) for method in TITLES}
        sgd = [found[m] for m in ("sgd-linear", "sgd-sqrt") if found[m]]
        cells = [f"{batch:,}"]
        for method, top1 in found.items():
            rate = study.rate(method, batch)
            cells.append(f"{mean_and_spread(top1, 2)} ({rate:g})" if top1 else "")
        gap = ""
        if found["lars"] and sgd:
            best = max(sgd, key=statistics.mean)
            p = stats.ttest_ind(found["lars"], best, equal_var=False).pvalue
            gap = f"{statistics.mean(found['lars']) - statistics.mean(best):+.2f} (p = {p:.2g})"
        rows.append([*cells, gap])
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
            said = {r: "diverged" if top1 < 0 else f"{top1:.2f}" for r, top1 in tuned.items()}
            cells.append(", ".join(f"**{r:g}: {text}**" if r == best else f"{r:g}: {text}" for r, text in said.items()))
        rows.append(cells)
    return markdown(["batch", *TITLES.values()], rows)


def ablation_table(study: Study, batch: int) -> str:
    """Each change beside LARS as it is."""
    usual = study.top1("lars", batch)
    rows = [["LARS as it is", "", mean_and_spread(usual, 2), ""]]
    for name, overrides in study.grid["ablations"].items():
        top1 = study.top1("lars", batch, name)
        gap = ""
        if top1 and usual:
            p = stats.ttest_ind(top1, usual, equal_var=False).pvalue
            gap = f"{statistics.mean(top1) - statistics.mean(usual):+.2f} (p = {p:.2g})"
        rows.append([name, f"`{' '.join(overrides)}`", mean_and_spread(top1, 2), gap])
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
