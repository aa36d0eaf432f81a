"""The study's design: which settings are tried, and what the ledger holds of them. Nothing is trained here."""

from __future__ import annotations

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


def reached(run: Path) -> float | None:
    """Steps until an evaluation reached the target, interpolated between that one and the one before; None if never."""
    before = (0, GUESSING)
    for line in read_lines(run / "metrics.jsonl", "eval"):
        if line["top1"] >= TARGET["top1"]:
            share = (TARGET["top1"] - before[1]) / (line["top1"] - before[1])
            return before[0] + share * (line["step"] - before[0])
        before = (line["step"], line["top1"])
    return None


def target_folder(setting: Setting, seed: int) -> Path:
    return RESULTS / "target" / setting.label / f"seed-{seed}"


def fastest(method: str, batch: int) -> Setting | None:
    """The setting that reached the target in the fewest steps with the first seed; None if none did or was run."""
    first = TARGET["seeds"][0]
    steps = {each: reached(target_folder(each, first)) for each in settings(TARGET, method, batch)}
    there = {each: count for each, count in steps.items() if count is not None}
    return min(there, key=there.get) if there else None


def steps_to_target(method: str, batch: int) -> list[float | None]:
    """Of the fastest setting, a seed each, None for a seed that did not get there; [] while a run is missing."""
    if (setting := fastest(method, batch)) is None:
        return []
    runs = [target_folder(setting, seed) for seed in TARGET["seeds"]]
    return [reached(run) for run in runs] if all(read_result(run) for run in runs) else []
