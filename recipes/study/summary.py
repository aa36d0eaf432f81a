"""`python recipes/study/summary.py [--collect]`: the study's tables and figures from its committed runs. What `make tables` calls.

`--collect` first puts finished runs of runs/study/ into the ledger, recipes/study/results/<model>/<run>/seed-<n>/.
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

from study import RESULTS, RUNS, label_of, rates, score  # noqa: E402

from lars.ledger import entries, keep  # noqa: E402
from lars.run import diverged, read_lines, read_result  # noqa: E402
from lars.tables import markdown, mean_and_spread, replace_marked  # noqa: E402

README = HERE / "README.md"
TITLES = {"sgd-linear": "SGD, linear scaling", "sgd-sqrt": "SGD, square-root scaling", "lars": "LARS"}  # in the tables' order
COLOURS = {"sgd-linear": "#d55e00", "sgd-sqrt": "#e69f00", "lars": "#0072b2"}  # told apart by the colour-blind, too
NETS = {"resnet": "ResNet", "alexnet": "AlexNet"}


class Study:
    """What the ledger holds of one net, seen through the design."""

    def __init__(self, grid: dict[str, Any], model: str) -> None:
        self.grid, self.model = grid, model
        self.batches = sorted({batch for part in grid["parts"] if part["model"] == model for batch in part.get("batches", [])})

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


def draw(study: Study, picture: Path) -> None:
    """As the paper draws them: accuracy against batch, loss against epoch, trust ratios over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps, pyplot

    figure, ((accuracy, trust), losses) = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    first = study.grid["base_batch"]
    for method, title in TITLES.items():
        # scaling rules meet at the base batch: one SGD there
        tops = {b: study.top1("sgd-linear" if (method, b) == ("sgd-sqrt", first) else method, b) for b in study.batches}
        tops = {b: top1 for b, top1 in tops.items() if top1}
        style = {"color": COLOURS[method], "marker": "o", "label": title, "linestyle": ":" if method == "sgd-sqrt" else "-"}
        means, spreads = ([of(top1) for top1 in tops.values()] for of in (statistics.mean, statistics.stdev))
        accuracy.errorbar(list(tops), means, spreads, capsize=3, **style)
    done = [b for b in study.batches if b != first and study.runs("lars", b)]
    for axis, batch in zip(losses, done[-2:]):
        for method, title in TITLES.items():
            for number, run in enumerate(study.runs(method, batch)):
                lines, label = read_lines(run / "metrics.jsonl", "train"), title if number == 0 else None
                style = {"color": COLOURS[method], "linestyle": ":" if method == "sgd-sqrt" else "-", "linewidth": 1}
                axis.plot([x["epoch"] for x in lines], [x["loss"] for x in lines], label=label, **style)
        axis.set_title(f"training loss, batch {batch:,}, a line a seed", fontsize=10)
        axis.legend()
    if done:
        lines = read_lines(study.runs("lars", done[-1])[0] / "metrics.jsonl", "trust")
        layers = list(lines[0]["ratios"])
        for number, layer in enumerate(layers):
            colour = colormaps["viridis"](number / max(1, len(layers) - 1))
            trust.plot([x["epoch"] for x in lines], [x["ratios"][layer] for x in lines], color=colour, label=layer)
        trust.set_yscale("log")
        trust.legend(fontsize=6, ncols=2)
        trust.set_title(f"trust ratio of each layer, LARS, batch {done[-1]:,}", fontsize=10)
    accuracy.set_xscale("log", base=2)
    accuracy.set_xticks(study.batches, [f"{b:,}" for b in study.batches])
    accuracy.set_xlabel("batch")
    accuracy.set_title("top-1 %, test images, mean and spread of the seeds", fontsize=10)
    accuracy.legend()
    for axis in (trust, *losses):
        axis.set_xlabel("epoch")
    for axis in (accuracy, trust, *losses):
        axis.grid(alpha=0.3)
    figure.suptitle(f"{NETS[study.model]} on CIFAR-10, 8 epochs")
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)


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
