"""The study's design: which settings are tried, and what the ledger holds of them. Nothing is trained here."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lars.run.reading import diverged, read_lines, read_result

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DESIGN = yaml.safe_load((HERE / "design.yaml").read_text())
FIXED, TARGET, METHODS = DESIGN["fixed"], DESIGN["target"], DESIGN["methods"]
GUESSING = 10.0  # top-1 % of a run that diverged
TRAINED = 45_000  # images


@dataclass(frozen=True)
class Setting:
    """One method at one batch with one rate, momentum and warm-up."""

    method: str
    batch: int
    k: int  # of the rate
    momentum: float
    warmup: float  # epochs

    @property
    def effective(self) -> float:
        """Rate / (1 - momentum): how far a constant gradient moves a weight in the long run. LAMB's is its rate."""
        method = METHODS[self.method]
        return method["base"] * 2**self.k * (self.batch / 256) ** method["exponent"]

    @property
    def rate(self) -> float:
        share = 1.0 if self.method == "lamb" else 1 - self.momentum
        return float(f"{self.effective * share:.3g}")

    @property
    def label(self) -> str:
        return f"{self.method}-b{self.batch}-k{self.k}-m{self.momentum:g}-w{self.warmup:g}"

    def overrides(self) -> list[str]:
        momentum = "beta1" if self.method == "lamb" else "momentum"
        keys = [f"global_batch={self.batch}", f"optimizer.lr={self.rate:g}", f"optimizer.{momentum}={self.momentum:g}"]
        return [*keys, f"schedule.warmup_epochs={self.warmup:g}"]


def settings(part: dict[str, Any], method: str, batch: int) -> list[Setting]:
    """All that are tried in a part of the study, `FIXED` or `TARGET`: two at every rate."""
    first, last = part["rates"][batch]
    pairs = DESIGN["pairs"]
    return [Setting(method, batch, k, *pair) for k in range(first, last + 1) for pair in pairs[k % 2]]


def at_edge(part: dict[str, Any], setting: Setting) -> bool:
    """Whether no rate beyond it was tried on one side: the range is then widened there, for all methods alike."""
    return setting.k in part["rates"][setting.batch]


def result(place: str, label: str, seed: int) -> dict[str, Any]:
    """Of a run in the ledger, {} where it is not there."""
    return read_result(RESULTS / place / label / f"seed-{seed}")


def top1(place: str, label: str, seed: int) -> float | None:
    """At the end of a run in per cent; None where it was not run."""
    found = result(place, label, seed)
    return None if not found else GUESSING if diverged(found) else found["top1"]


def finalists(method: str, batch: int) -> list[Setting]:
    """The best settings by one seed, the best first; none while a setting was not tried."""
    tried = settings(FIXED, method, batch)
    scores = {each: top1("tuning", each.label, FIXED["tuning_seed"]) for each in tried}
    if any(score is None for score in scores.values()):
        return []
    return sorted(tried, key=lambda each: (-scores[each], each.k))[: FIXED["finalists"]]


def final_mean(setting: Setting) -> float | None:
    """Mean top-1 on the images held back over the new seeds; None while one is missing."""
    found = [top1("tuning", setting.label, seed) for seed in FIXED["final_seeds"]]
    return None if None in found else statistics.mean(found)


def chosen(method: str, batch: int) -> Setting | None:
    """The finalist with the highest mean; None while a run of theirs is missing."""
    means = {setting: final_mean(setting) for setting in finalists(method, batch)}
    return max(means, key=means.get) if means and None not in means.values() else None


def tested(method: str, batch: int) -> list[float]:
    """Top-1 on the test images with the test seeds, [] while one is missing."""
    if (setting := chosen(method, batch)) is None:
        return []
    found = [top1("test", setting.label, seed) for seed in FIXED["test_seeds"]]
    return [] if None in found else found


def target_folder(setting: Setting, seed: int) -> Path:
    return RESULTS / "target" / setting.label / f"seed-{seed}"


def steps_of(batch: int, epochs: int) -> int:
    """Steps until so many epochs are over, at most those of a whole run, whose last epoch may end within a step."""
    return min(math.ceil(epochs * TRAINED / batch), round(TARGET["rungs"][-1] * TRAINED / batch))


def has_run(run: Path, steps: int) -> bool:
    """Whether a run in the ledger went so far, or diverged before."""
    found = read_result(run)
    return diverged(found) or (found.get("steps") or 0) >= steps


def evaluations(run: Path, within: float = math.inf) -> list[tuple[int, float]]:
    """(step, top-1) of each evaluation in the first `within` steps."""
    lines = read_lines(run / "metrics.jsonl", "eval")
    return [(line["step"], line["top1"]) for line in lines if line["step"] <= within]


def reached(run: Path, within: float = math.inf) -> float | None:
    """Steps until an evaluation reached the target, interpolated between that one and the one before; None if never."""
    before = (0, GUESSING)
    for step, top1 in evaluations(run, within):
        if top1 >= TARGET["top1"]:
            return before[0] + (TARGET["top1"] - before[1]) / (top1 - before[1]) * (step - before[0])
        before = (step, top1)
    return None


def search(method: str, batch: int) -> tuple[list[Setting], int]:
    """What the ledger lacks of the first rung that is not complete, and that rung's steps; nothing when all is over.

    The search ends with the rung in which some setting reaches the target: no other can do it in fewer steps later.
    """
    first, alive, steps = TARGET["seeds"][0], settings(TARGET, method, batch), 0
    for epochs, survivors in zip(TARGET["rungs"], [*TARGET["survivors"], None]):
        steps = steps_of(batch, epochs)
        folders = {each: target_folder(each, first) for each in alive}
        if missing := [each for each, run in folders.items() if not has_run(run, steps)]:
            return missing, steps
        if any(reached(run, steps) is not None for run in folders.values()):
            break
        last = {each: evaluations(run, steps)[-1:] for each, run in folders.items() if not diverged(read_result(run))}
        scores = {each: last[each][0][1] if last.get(each) else GUESSING for each in alive}
        alive = sorted(alive, key=lambda each: (-scores[each], each.k))[:survivors]
    return [], steps


def fastest(method: str, batch: int) -> Setting | None:
    """The setting that reached the target in the fewest steps; None if none did, or while the search is not over."""
    missing, steps = search(method, batch)
    runs = {each: target_folder(each, TARGET["seeds"][0]) for each in settings(TARGET, method, batch)}
    there = {each: count for each, run in runs.items() if (count := reached(run, steps)) is not None}
    return min(there, key=there.get) if there and not missing else None


def steps_to_target(method: str, batch: int) -> list[float]:
    """Of the fastest setting, a seed each, infinite where a run never got there; [] while a run is missing."""
    if search(method, batch)[0]:
        return []
    if (setting := fastest(method, batch)) is None:
        return [math.inf] * len(TARGET["seeds"])
    runs, last = [target_folder(setting, seed) for seed in TARGET["seeds"]], steps_of(batch, TARGET["rungs"][-1])
    steps = [reached(run) or (math.inf if has_run(run, last) else None) for run in runs]
    return [] if None in steps else steps
