"""A pass as train.py would play it, on made-up samples."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lars.engine.base import Engine
from lars.engine.build import build_model, build_optimizer, start_engine
from lars.recipe import config
from lars.recipe.batch import BatchPlan
from lars.recipe.launched import Launched
from lars.recipe.model_file import import_model_file


class Skipped(Exception):
    """This machine lacks what the item needs."""


def engine_for(path: Path, *overrides: str) -> tuple[Engine, BatchPlan]:
    """The engine that train.py would build for one process, with its model and optimizer."""
    import_model_file(path.parent)
    recipe = config.load(path, ["runtime.portable=false", "trackers=[]", *overrides])
    engine = start_engine(recipe, Launched("plain", 1))
    model, ghosts = build_model(recipe)
    plan = BatchPlan.of(recipe, 1_281_167, 1)  # as many as the largest of these recipes wants
    engine.prepare(model, ghosts)
    engine.wrap(build_optimizer(recipe, model), plan)
    engine.pin_arithmetic()
    return engine, plan


def samples(engine: Engine, count: int) -> tuple[Tensor, Tensor]:
    """Made-up pixels and labels where the loader leaves them: in memory that the GPU can read."""
    size, draw = engine.recipe.model.image_size, torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=draw)
    labels = torch.randint(engine.recipe.model.num_classes, (count,), generator=draw)
    if engine.device.type == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()
    return images.permute(0, 3, 1, 2), labels
