"""Everything that can be wrong before the first step, found in one process; what `recipes/train.py --check` says."""
from __future__ import annotations

import logging
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from lars.batch import BatchPlan
from lars.checkpoint import check_room
from lars.config import Recipe, RecipeError
from lars.data.index import Index, build_indexes
from lars.data.loader import data_line
from lars.engine import build_model, build_optimizer
from lars.launched import uses_cpu
from lars.memory import memory_line

log = logging.getLogger("lars")


def check(recipe: Recipe, engine: str, processes: int) -> tuple[Index, Index, BatchPlan, str]:
    """Both indexes, the batch arithmetic, and two lines: the memory that a process needs, and what it reads.

    Raises:
        RecipeError: trackers, data, model or numbers that cannot be trained.
    """
    if unknown := set(recipe.trackers) - set(LOGGER_TYPE_TO_CLASS):
        raise RecipeError(f"trackers={sorted(unknown)} unknown to accelerate: use {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
    if recipe.runtime.portable and recipe.precision == "bf16" and uses_cpu():
        log.warning(
            "precision=bf16 has no quick kernels in the portable instruction set: a step of ResNet-50 at 224 pixels took 64 s "
            "instead of 3.5 s on an EPYC; runtime.portable=false is quicker"
        )
    train, val = build_indexes(recipe.data, recipe.model.num_classes)
    plan = BatchPlan.of(recipe, train.samples, processes)
    build_optimizer(recipe, model := build_model(recipe)[0])
    check_room(Path(recipe.run_dir), recipe.checkpoint.keep, model)
    return train, val, plan, f"{memory_line(model, recipe, plan, engine)}\n{data_line(recipe, train, plan)}"
