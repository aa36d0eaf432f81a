"""Runs as their folders tell them, and groups of runs that differ in nothing but the seed."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lars.recipe.keys import completed, fixing
from lars.run.reading import flatten_run, read_lines, read_result


class Run:
    """What the files of a run folder say; any of them may be missing."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.result = read_result(path)
        flat = flatten_run(path)
        self.recipe = str(self.result.get("recipe") or flat.get("name") or path)[:200]
        self.seed = flat.get("seed") if isinstance(flat.get("seed"), int) else None
        self.keys = {key: value for key, value in fixing(flat).items() if key != "seed"}
        if self.keys:  # what else decides where the run ends: a shorter run, or other data, is no further seed
            self.keys = completed(self.keys)
            self.keys["max_steps"] = flat.get("max_steps")
            self.keys["data_fingerprint"] = self.result.get("data_fingerprint")
        lines = read_lines(path / "metrics.jsonl")
        self.train = [line for line in lines if line.get("kind") == "train"]
        self.evals = [line for line in lines if line.get("kind") == "eval"]
        self.trust = [line for line in lines if line.get("kind") == "trust"]

    @property
    def status(self) -> str:
        return str(self.result.get("status", "not started"))


@dataclass
class Group:
    """Runs of one recipe that differ in nothing but the seed. `keys`: what they share, {} if that is not known."""

    recipe: str
    keys: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    label: str = ""

    def seeds(self) -> list[Run]:
        """The first finished run of each seed: the same seed again is the same run, not a further sample."""
        found: dict[int | None, Run] = {}
        for run in self.runs:
            if run.status == "finished":
                found.setdefault(run.seed, run)
        return list(found.values())


def grouped(paths: list[Path]) -> list[Group]:
    """The groups of some runs, each with a label of its own.

    Raises:
        RecipeError: a file of a run is damaged.
    """
    groups: list[Group] = []
    folders = [path.absolute() for path in paths]
    shared = os.path.commonpath([folder.parent for folder in folders])
    for path, folder in zip(paths, folders):
        run = Run(path, os.path.relpath(folder, shared))
        same = (group for group in groups if run.keys and (group.recipe, group.keys) == (run.recipe, run.keys))
        if (group := next(same, None)) is None:
            groups.append(group := Group(run.recipe, run.keys))
        group.runs.append(run)
    recipes = {group.recipe for group in groups}
    for recipe in recipes:
        _label([group for group in groups if group.recipe == recipe], recipe if len(recipes) > 1 else "")
    for group in groups:
        group.runs.sort(key=lambda run: (run.seed is None, run.seed))
    return groups


def _label(groups: list[Group], start: str) -> None:
    """Name groups of one recipe by `start`, and by the first keys that tell them apart: "optimizer=lars lr=10.0"."""
    labels = [start if len(groups) > 1 else group.recipe for group in groups]
    for key in differing(groups):
        short = key.removesuffix(".name").rpartition(".")[2]
        longer = []
        for label, group in zip(labels, groups):
            if key in group.keys:
                label = f"{label} {short}={written(group.keys[key])[:24]}".strip()
            longer.append(label)
        if len(set(longer)) > len(set(labels)):
            labels = longer
    for group, label in zip(groups, labels):
        group.label = label if labels.count(label) == 1 else f"{label} ({group.runs[0].name})".strip()


def differing(groups: list[Group]) -> list[str]:
    """The keys that not all groups share, in the order of a recipe; groups whose keys are not known are not asked."""
    known = [group.keys for group in groups if group.keys]
    every = dict.fromkeys(key for keys in known for key in keys)
    return [key for key in every if any(keys.get(key) != known[0].get(key) for keys in known)]


def mean_and_spread(values: list[float], form: str = ".1f") -> str:
    """81.0 ± 0.9: mean and standard deviation between seeds (n - 1); for one seed the mean alone, for none nothing."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def written(value: Any) -> str:
    """A value as a recipe has it: text as it is, null, true, lists."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
