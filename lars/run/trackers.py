"""accelerate's trackers (TensorBoard, ...): they get the recipe and the numbers, and never end a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from lars.recipe.config import flatten
from lars.recipe.keys import Recipe
from lars.recipe.refusal import RecipeError, one_line

log = logging.getLogger("lars")


def check(names: list[str]) -> None:
    """accelerate leaves a tracker that is not installed out without a word.

    Raises:
        RecipeError: it is not installed, or accelerate has none of that name.
    """
    if unknown := sorted(set(names) - set(LOGGER_TYPE_TO_CLASS)):
        raise RecipeError(f"trackers={unknown} unknown to accelerate: use {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
    usable = {*map(str, get_available_trackers()), *(set(LOGGER_TYPE_TO_CLASS) - set(LoggerType.list()))}
    if missing := sorted(set(names) - usable):
        remedy = f"`pip install {' '.join(missing)}`, or leave it out, as in trackers=[tensorboard]"
        raise RecipeError(f"trackers={missing} not installed: {remedy}")


class _Guarded:
    """A tracker that is left out, with one warning, once it fails."""

    def __init__(self, name: str) -> None:
        self.name, self.tracker = name, None

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # each tracker has its own; the run does not need it
            reason = f"{type(error).__name__}: {one_line(error)}"
            log.warning("the tracker %s failed and gets nothing more (%s)", self.name, reason)
            self.tracker = None

    def start(self, accelerator: Accelerator, project: str, values: dict[str, Any], options: dict[str, Any]) -> None:
        def begin() -> None:
            accelerator.log_with, accelerator.trackers = [self.name], []
            accelerator.init_trackers(project, values, {self.name: options})
            self.tracker = next(iter(accelerator.trackers), None)  # most are given to the first process alone

        self._try(begin)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if self.tracker is not None:
            self._try(lambda: self.tracker.log(values, step=step, **kwargs))

    def finish(self) -> None:
        if self.tracker is not None:
            self._try(self.tracker.finish)


def start(accelerator: Accelerator, recipe: Recipe) -> Callable[..., None] | None:
    """Start the recipe's trackers, whose files lie in `RUN/logs`; what sends numbers to them all, None without any.

    They are told the run's name and the flat keys of the recipe, in which environment variables stand by name.
    """
    if not recipe.trackers:
        return None
    values = {k: v if isinstance(v, (bool, int, float, str)) else json.dumps(v) for k, v in flatten(recipe).items()}
    run, folder = f"{recipe.name}/seed-{recipe.seed}", f"{recipe.run_dir}/logs"
    # each has its own word for the run's name and the folder of its files; the others write to their servers alone
    options = {
        "wandb": {"name": run, "dir": recipe.run_dir},
        "mlflow": {"run_name": run, "logging_dir": folder},
        "swanlab": {"experiment_name": run, "logdir": folder},
        "dvclive": {"dir": folder},
        "trackio": {"name": run},
    }
    guarded = [_Guarded(name) for name in dict.fromkeys(recipe.trackers)]
    for one in guarded:
        # TensorBoard makes a folder of it
        project = "logs" if one.name == "tensorboard" else recipe.name.replace("/", "-")
        one.start(accelerator, project, values, options.get(one.name, {}))
    accelerator.trackers = guarded
    return accelerator.log
