"""Runs as their folders tell them, and groups of runs that differ in nothing but the seed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lars.recipe.keys import completed, fixing
from lars.run.reading import flatten_run, read_lines, read_result


class Run:
    """What the files of a run folder say; any of them may be missing."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.result, flat = path, name, read_result(path), flatten_run(path)
        self.recipe = str(self.result.get("recipe") or flat.get("name") or path)[:200]
        self.seed = flat.get("seed") if isinstance(flat.get("seed"), int) else None
        self.keys = {key: value for key, value in fixing(flat).items() if key != "seed"}
        if self.keys:  # what else decides where the run ends: a shorter run, or other data, is no further seed
            self.keys = completed(self.keys) | {
                "max_steps": flat.get("max_steps"),
                "data_fingerprint": self.result.get("data_fingerprint"),
            }
        lines = read_lines(path / "metrics.jsonl")
        self.train, self.evals, self.trust = (
            [x for x in lines if x.get("kind") == kind] for kind in ("train", "eval", "trust")
        )

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
        """One finished run of each seed: the same seed again is the same run, not a further sample."""
        return list({run.seed: run for run in reversed(self.runs) if run.status == "finished"}.values())[::-1]


def grouped(paths: list[Path]) -> list[Group]:
    """The groups of some runs, each with a label of its own.

    Raises:
        RecipeError: a file of a run is damaged.
    """
    groups: list[Group] = []
    folders = [path.absolute() for path in paths]
    shared = os.path.commonpath([folder.parent for folder in folders]) if folders else ""
    for path, folder in zip(paths, folders):
        run = Run(path, os.path.relpath(folder, shared))
        known = (g for g in groups if run.keys and (g.recipe, g.keys) == (run.recipe, run.keys))
        group = next(known, None) or Group(run.recipe, run.keys)
        group.runs.append(run)
        groups += [group] if len(group.runs) == 1 else []
    recipes = {g.recipe for g in groups}
    for recipe in recipes:
        _label([g for g in groups if g.recipe == recipe], recipe if len(recipes) > 1 else "")
    for group in groups:
        group.runs.sort(key=lambda run: (run.seed is None, run.seed))
    return groups


def _label(groups: list[Group], start: str) -> None:
    """Name groups of one recipe by `start`, and by the first keys that tell them apart: "optimizer=lars lr=10.0"."""
    labels = [start if len(groups) > 1 else group.recipe for group in groups]
    for key in differing(groups):
        short = key.removesuffix(".name").rpartition(".")[2]
        longer = [
            f"{label} {short}={written(g.keys[key])[:24]}".strip() if key in g.keys else label
            for label, g in zip(labels, groups)
        ]
        labels = longer if len(set(longer)) > len(set(labels)) else labels
    for group, label in zip(groups, labels):
        group.label = label if labels.count(label) == 1 else f"{label} ({group.runs[0].name})".strip()


def differing(groups: list[Group]) -> list[str]:
    """The keys that not all groups share, in the order of a recipe; groups whose keys are not known are not asked."""
    known = [g.keys for g in groups if g.keys]
    every = dict.fromkeys(key for keys in known for key in keys)
    return [key for key in every if any(key not in keys or keys[key] != known[0].get(key) for keys in known)]


def written(value: Any) -> str:
    """A value as a recipe has it: text as it is, null, true, lists."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
