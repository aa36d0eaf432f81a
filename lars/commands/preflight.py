"""Everything that can be wrong before the first step, found in one process; what `recipes/train.py --check` says."""

from __future__ import annotations

import logging
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lars.commands.convert import pack
from lars.data.augment import check_policy
from lars.data.index import Index, build_indexes, images_at
from lars.data.loader import data_line
from lars.data.reader import check_memory
from lars.engine.build import build_model, build_optimizer, sums_order_free
from lars.engine.memory import memory_of
from lars.exact.kernels import kernels
from lars.recipe import pretrained
from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Checkpoint, Recipe
from lars.recipe.launched import uses_cpu
from lars.recipe.refusal import RecipeError
from lars.run import checkpoint, trackers
from lars.run.reading import read_result

log = logging.getLogger("lars")


@dataclass(frozen=True)
class Preflight:
    """What a run is about to be: both splits, the arithmetic of its batches, and a line each on memory and data.

    needed: bytes of memory of a process, 0 where they are not known.
    """

    train: Index
    val: Index
    plan: BatchPlan
    memory: str
    needed: float


def preflight(recipe: Recipe, engine: str, processes: int) -> Preflight:
    """Look at everything that a run of so many processes on this engine needs, and train nothing.

    Raises:
        RecipeError: a run folder, trackers, a policy, data, model or numbers that cannot be trained.
    """
    can_be_written(Path(recipe.run_dir))
    trackers.check(recipe.trackers)
    if not checkpoint.saved(Path(recipe.run_dir)):
        pretrained.require(recipe.model.kwargs, recipe.run_dir)
    if recipe.ema_decay and engine in ("zero3", "fsdp2"):
        raise RecipeError(f"ema_decay averages whole weights, and {engine} keeps slices: use zero2, or leave it out")
    if recipe.augment.randaugment is not None:
        check_policy(recipe.augment.randaugment)
    if recipe.runtime.portable and recipe.precision == "bf16" and uses_cpu():
        log.warning(
            "precision=bf16 has no quick kernels in the portable instruction set: a step of ResNet-50 at 224 pixels "
            "took 64 s instead of 3.5 s on an EPYC; runtime.portable=false is quicker"
        )
    if engine == "plain" and uses_cpu() and kernels() is None:
        log.warning(
            "the C loops of this version are not built (no C compiler, or an older build), so adding the gradients of "
            "a pass takes longer (58.7 instead of 39.3 ms for ResNet-50): with a compiler give `pip install -e .` again"
        )
    if images := images_at(recipe.data):
        pack(images)
    train, val = build_indexes(recipe.data, recipe.model.num_classes)
    for index in (train, val):
        check_memory(index)
    even = engine != "plain" or not sums_order_free(recipe, processes)
    plan = BatchPlan.of(recipe, train.samples, processes, even)
    build_optimizer(recipe, model := build_model(recipe)[0])
    check_room(Path(recipe.run_dir), recipe.checkpoint, model)
    memory, needed = memory_of(model, recipe, plan, engine)
    return Preflight(train, val, plan, f"{memory}\n{data_line(recipe, train, plan)}", needed)


def can_be_written(run: Path) -> None:
    """Whether `run` is or can become a folder of this user's; what has to be made to find out is removed again."""
    for left in reversed(range(10)):
        try:
            return _write_there(run)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and left:  # another process that looks too has removed the folder
                continue
            why = "there is a file or a link of that name" if isinstance(error, FileExistsError) else error.strerror
            raise RecipeError(f"run_dir={run} cannot be written ({why}): give another run_dir=...") from None


def _write_there(run: Path) -> None:
    made: list[Path] = []
    try:
        for folder in (*reversed(run.absolute().parents), run.absolute()):
            if not folder.is_dir():
                folder.mkdir(exist_ok=True)
                made.append(folder)
        with tempfile.TemporaryFile(dir=run):
            pass
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # somebody uses it by now
                folder.rmdir()


def check_room(run: Path, keys: Checkpoint, model: nn.Module) -> None:
    """Before a run: its disk must have room for the checkpoints that are kept and the one that is being written.

    Raises:
        RecipeError: it has not.
    """
    if read_result(run).get("status") == "finished":  # nothing more may be asked of it
        return
    # The parameters count twice, since their momentum is saved too.
    size = sum(t.numel() * t.element_size() for t in (*model.state_dict().values(), *model.parameters()))
    there = sum(file.stat().st_size for kept in checkpoint.saved(run) for file in kept.iterdir())
    free = shutil.disk_usage(next(p for p in (run, *run.absolute().parents) if p.exists())).free
    most = keys.keep + keys.keep_best + 1
    if there + free < most * size:
        raise RecipeError(
            f"{run} has room for {free / 2**20:,.0f} MiB, but {most} checkpoints (checkpoint.keep={keys.keep}, and "
            f"the one that is being written) take {most * size / 2**20:,.0f}: make room, lower checkpoint.keep or "
            "give another run_dir=..."
        )
