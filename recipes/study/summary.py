"""`python recipes/study/summary.py`: the study's tables and figures from its committed runs. `make tables` calls it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path

import design
from design import FIXED, HERE, METHODS, RESULTS, TARGET
from figure import TITLES, better, draw, final_losses
from scipy import stats

from lars.commands.tables import markdown, replace_marked
from lars.report.groups import mean_and_spread
from lars.run.reading import diverged, read_result

README = HERE / "README.md"


def progress() -> str:
    """How far the study is, in one sentence."""
    wanted, done = 0, 0
    for method, batch in product(METHODS, FIXED["rates"]):
        tried, chosen = design.settings(FIXED, method, batch), design.chosen(method, batch)
        finalists = design.finalists(method, batch)
        runs = [("tuning", setting, FIXED["tuning_seed"]) for setting in tried]
        runs += [("tuning", setting, seed) for setting in finalists for seed in FIXED["final_seeds"]]
        runs += [("test", chosen, seed) for seed in FIXED["test_seeds"] if chosen]
        done += sum(bool(design.result(place, setting.label, seed)) for place, setting, seed in runs)
        wanted += len(tried) + FIXED["finalists"] * len(FIXED["final_seeds"]) + len(FIXED["test_seeds"])
    points = [design.steps_to_target(method, batch) for method, batch in product(METHODS, TARGET["rates"])]
    reached = f"{sum(map(bool, points))} of {len(points)} points of steps to a target"
    return f"Run so far: {done} of {wanted} runs at fixed epochs, {reached}."


def holm(p_values: dict[tuple[int, str], float]) -> dict[tuple[int, str], float]:
    """Each p-value corrected for the number of comparisons (Holm 1979)."""
    corrected, largest = {}, 0.0
    for place, key in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[key]))
        corrected[key] = largest
    return corrected


def comparisons() -> dict[tuple[int, str], float]:
    """{(batch, method): p} of LARS against every other method, corrected; none before all of them were tested."""
    found = {(batch, method): design.tested(method, batch) for batch in FIXED["rates"] for method in METHODS}
    if not all(found.values()):
        return {}
    others = [key for key in found if key[1] != "lars"]
    p_values = {key: stats.ttest_ind(found[key[0], "lars"], found[key], equal_var=False).pvalue for key in others}
    return holm({key: 1.0 if math.isnan(p) else p for key, p in p_values.items()})  # nan: all runs of both guess


def findings() -> str:
    """What the comparisons say, a line for each batch; nothing before all of them were made."""
    p_values, lines = comparisons(), []
    for batch in sorted(FIXED["rates"]) if p_values else []:
        means = {method: statistics.mean(design.tested(method, batch)) for method in METHODS}
        told: dict[str, list[str]] = {"above": [], "below": [], "not told apart from": []}
        for method in METHODS:
            if method != "lars":
                word = "above" if means["lars"] > means[method] else "below"
                told[word if p_values[batch, method] < 0.05 else "not told apart from"].append(TITLES[method])
        reached = ", ".join(f"{TITLES[method]} {mean:.1f}" for method, mean in means.items())
        verdict = "; ".join(f"{word} {', '.join(names)}" for word, names in told.items() if names)
        lines.append(f"- batch {batch:,}: {reached}. LARS is {verdict}.")
    head = (
        "Test top-1 after 8 epochs, five new seeds; above and below: p < 0.05, corrected by Holm for nine comparisons:"
    )
    return "\n".join([head, "", *lines]) if lines else ""


def accuracy_table() -> str:
    """Test top-1 of every method at every batch with the chosen setting, and how far it is from LARS."""
    p_values, rows = comparisons(), []
    for batch in sorted(FIXED["rates"]):
        ours = design.tested("lars", batch)
        for method in METHODS:
            top1, setting = design.tested(method, batch), design.chosen(method, batch)
            apart = ""
            if ours and top1 and method != "lars":
                apart = f"{statistics.mean(ours) - statistics.mean(top1):+.2f}"
            if (batch, method) in p_values:
                apart += f" (p = {p_values[batch, method]:.2g})"
            chosen = f"{setting.rate:g}, {setting.momentum:g}, {setting.warmup:g}" if setting else ""
            rows.append([f"{batch:,}", TITLES[method], chosen, mean_and_spread(top1, ".2f"), apart])
    return markdown(["batch", "method", "rate, momentum, warm-up epochs", "top-1 %", "LARS less it"], rows)


def _steps(count: float) -> str:
    return "never" if math.isinf(count) else f"{count:.0f}"


def _by_method(rows: list[list[str]]) -> str:
    return markdown(["batch", *(TITLES[method] for method in METHODS)], rows)


def target_table() -> str:
    """Steps to the target of every method at every batch: the median seed, the fewest and the most."""
    rows = []
    for batch in TARGET["rates"]:
        cells = [f"{batch:,}"]
        for method in METHODS:
            steps = sorted(design.steps_to_target(method, batch))
            said = [_steps(step) for step in steps]
            cells.append(f"{said[len(said) // 2]} ({said[0]} to {said[-1]})" if said else "")
        rows.append(cells)
    return _by_method(rows)


def _medians(method: str) -> list[float | None]:
    """Steps of the median seed at every batch; None where a run is missing."""
    found = [design.steps_to_target(method, batch) for batch in TARGET["rates"]]
    return [statistics.median(steps) if steps else None for steps in found]


def scaling_table() -> str:
    """By which factor the median steps to the target fall from a batch to the next, four times as large."""
    pairs = [f"{batch:,} to {larger:,}" for batch, larger in pairwise(TARGET["rates"])]
    columns = [[_factor(*both) for both in pairwise(_medians(method))] for method in METHODS]
    return _by_method([list(row) for row in zip(pairs, *columns)])


def _factor(before: float | None, after: float | None) -> str:
    return "" if None in (before, after) or math.inf in (before, after) else f"{before / after:.1f}"


def stability_table() -> str:
    """The effective rate of the lowest final training loss, and from which one on a method only guesses."""
    rows = []
    for batch in sorted(FIXED["rates"]):
        cells = [f"{batch:,}"]
        for method in METHODS:
            losses = better(final_losses(method, batch))
            learns = max((setting.k for setting, loss in losses.items() if loss < math.log(10)), default=-math.inf)
            guesses = [f"{setting.effective:.3g}" for setting in losses if setting.k > learns]
            cells.append(f"{min(losses, key=losses.get).effective:.3g}; {[*guesses, 'none'][0]}" if losses else "")
        rows.append(cells)
    return _by_method(rows)


def scaling() -> str:
    """The median steps to the target of every method at every batch; nothing before all of them were run."""
    found = {method: _medians(method) for method in METHODS}
    if any(None in medians for medians in found.values()):
        return ""
    batches = ", ".join(f"{batch:,}" for batch in TARGET["rates"])
    head = f"Median steps to {TARGET['top1']:g} % at batch {batches} (perfect: a quarter each time)"
    of_method = [f"{TITLES[method]} {', '.join(map(_steps, medians))}" for method, medians in found.items()]
    return f"{head}: {'; '.join(of_method)}."


def tuning_table() -> str:
    """Every setting that was tried: top-1 on the images held back by the first seed; finalists with all seeds' mean."""
    rows = []
    for batch in sorted(FIXED["rates"]):
        for method in METHODS:
            best, chosen = design.finalists(method, batch), design.chosen(method, batch)
            for setting in design.settings(FIXED, method, batch):
                score = design.top1("tuning", setting.label, FIXED["tuning_seed"])
                mean = design.final_mean(setting) if setting in best else None
                final = "" if mean is None else f"**{mean:.2f}**" if setting == chosen else f"{mean:.2f}"
                values = (f"{setting.rate:g}", f"{setting.momentum:g}", f"{setting.warmup:g}")
                rows.append([f"{batch:,}", TITLES[method], *values, "" if score is None else f"{score:.2f}", final])
    head = ["batch", "method", "rate", "momentum", "warm-up", "first seed", "three new seeds"]
    return markdown(head, rows)


def search_table() -> str:
    """Every setting of the search for the target, by its first seed: how far it was trained, and when it was there."""
    rows = []
    for batch in TARGET["rates"]:
        for method in METHODS:
            fastest = design.fastest(method, batch)
            for setting in design.settings(TARGET, method, batch):
                folder = design.target_folder(setting, TARGET["seeds"][0])
                run, there = read_result(folder), design.reached(folder)
                values = (f"{setting.rate:g}", f"{setting.momentum:g}", f"{setting.warmup:g}")
                top1 = "" if not run else "diverged" if diverged(run) else f"{run['top1']:.2f}"
                count = "" if there is None else f"**{there:.0f}**" if setting == fastest else f"{there:.0f}"
                rows.append(
                    [f"{batch:,}", TITLES[method], *values, f"{run.get('steps') or 0:,}" if run else "", top1, count]
                )
    return markdown(["batch", "method", "rate", "momentum", "warm-up", "trained", "top-1 %", "there after"], rows)


def pages() -> Iterator[tuple[Path, str]]:
    """The study's pages and the repository's, as they have to read."""
    text = replace_marked(README.read_text(), "progress", progress())
    text = replace_marked(text, "accuracy", accuracy_table())
    text = replace_marked(text, "target", target_table())
    text = replace_marked(text, "scaling", scaling_table())
    yield README, replace_marked(text, "stability", stability_table())
    settings = HERE / "SETTINGS.md"
    text = replace_marked(settings.read_text(), "tuning", tuning_table())
    yield settings, replace_marked(text, "search", search_table())
    front = HERE.parents[1] / "README.md"
    yield front, replace_marked(front.read_text(), "study", f"{findings()}\n\n{scaling() or progress()}".strip())


def main() -> None:
    for file, text in pages():
        file.write_text(text)
    draw(RESULTS)


if __name__ == "__main__":
    main()
