"""What the keys of a recipe may be, one by one and together; checked before any process group is built."""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import Any

from lars.optim.key import HOLDS
from lars.recipe.keys import Recipe, declared
from lars.recipe.refusal import RecipeError, did_you_mean


def check(recipe: Recipe, flat: dict[str, Any]) -> None:
    """Refuse what cannot be trained.

    Args:
        flat: the same recipe by flat keys.

    Raises:
        RecipeError: names the key and what it may be.
    """
    augment, plain = recipe.augment, PurePosixPath(recipe.name)
    odd = not recipe.name.isprintable() or str(plain) != recipe.name
    if odd or plain.is_absolute() or {"..", "."} & {*plain.parts, recipe.name}:
        raise RecipeError(
            f"name={recipe.name!r} names the folder runs/<name>: write a relative path without .., as in resnet50/mine"
        )
    if "\0" in (recipe.run_dir or ""):
        raise RecipeError(f"run_dir={recipe.run_dir!r} is no path")
    for key, one in declared(type(recipe.optimizer)).items():
        value, choices, limit = flat[key], one.metadata["choices"], one.metadata["limit"]
        if choices and value not in choices:
            raise RecipeError(f"{key}={value} is unknown: use {' or '.join(choices)}{did_you_mean(value, choices)}")
        numbers = value if isinstance(value, list) else [value]
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise RecipeError(f"{key}={value} is not finite")
        if limit and value is not None and not HOLDS[limit](value):
            raise RecipeError(f"{key}={value} {limit}")
    for key in ("scale", "ratio"):
        value = flat[f"augment.{key}"]
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            raise RecipeError(f"augment.{key}={value} must be two positive numbers, smaller first")
    if augment.scale[1] > 1:
        raise RecipeError(f"augment.scale={augment.scale}: a crop has at most the area of its image, 1.0")
    if len(augment.mean) != 3 or len(augment.std) != 3 or min(augment.std) <= 0:
        raise RecipeError(
            "augment.mean and augment.std must be three numbers each (red, green, blue in 0 ... 255), std positive"
        )
    remedy = "pixels of 0 ... 255: multiply values of 0 ... 1 by 255"
    if not 0 <= min(augment.mean) <= max(augment.mean) <= 255 or 0 < max(augment.mean) <= 1:
        raise RecipeError(f"augment.mean={augment.mean} is subtracted from {remedy}")
    if max(augment.std) < 1:
        raise RecipeError(f"augment.std={augment.std} divides {remedy}")
    _check_sizes(recipe)
    if augment.eval_resize < recipe.model.image_size:
        size = f"model.image_size={recipe.model.image_size}"
        raise RecipeError(f"augment.eval_resize={augment.eval_resize} is smaller than {size}")
    if recipe.data.retry_seconds >= recipe.runtime.hang_seconds:
        raise RecipeError(
            f"data.retry_seconds={recipe.data.retry_seconds:g} must be below "
            f"runtime.hang_seconds={recipe.runtime.hang_seconds:g}, or the run would be ended as hanging first"
        )
    if recipe.runtime.portable and recipe.runtime.compile:
        excluded = "which runtime.portable=true excludes: set one of them to false"
        raise RecipeError(f"runtime.compile=true makes kernels for this CPU, {excluded}")
    if recipe.seed >= 2**63:
        raise RecipeError(f"seed={recipe.seed} does not fit 63 bits")
    _check_decay(recipe)


def _check_sizes(recipe: Recipe) -> None:
    sizes, begins = recipe.augment.sizes, recipe.augment.size_epochs
    told = f"augment.sizes={sizes} with augment.size_epochs={begins}"
    if any(size <= 0 for size in sizes) or len(begins) != max(0, len(sizes) - 1):
        raise RecipeError(f"{told}: one positive size more than there are epochs, as in [160, 192] with [12]")
    if not all(0 < a < b for a, b in zip(begins, [*begins[1:], recipe.epochs])):
        raise RecipeError(f"{told}: the epochs must be positive, grow and lie below epochs={recipe.epochs:g}")
    if sizes and recipe.augment.crop != "random_resized_crop":
        raise RecipeError("augment.sizes belong to augment.crop: random_resized_crop; another would cut out less")
    if sizes and recipe.runtime.compile:
        raise RecipeError(
            "runtime.compile=true makes other kernels for a size that is not the run's first, so a resumed run would "
            "have other bits: leave augment.sizes empty, or compile false"
        )


def _check_decay(recipe: Recipe) -> None:
    """A key that the shape of the decay has no use for would be believed to do something."""
    keys = recipe.schedule
    before = keys.hold_epochs + (keys.warmup_epochs if keys.decay_from == "warmup_end" else 0.0)
    if keys.warmup_epochs >= recipe.epochs:
        raise RecipeError(f"schedule.warmup_epochs={keys.warmup_epochs:g} must be below epochs={recipe.epochs:g}")
    if keys.shape != "polynomial" and keys.power != 1:
        raise RecipeError(f"schedule.power={keys.power:g} belongs to a polynomial, not to {keys.shape}: write power: 1")
    if keys.shape != "step" and before >= recipe.epochs and keys.decay_steps is None:
        raise RecipeError(f"schedule.hold_epochs={keys.hold_epochs:g} leaves nothing of epochs={recipe.epochs:g}")
    if (keys.shape == "step") != bool(keys.milestones):
        raise RecipeError("schedule.milestones, as in [30, 60, 80] epochs, belong to schedule.shape: step alone")
    if keys.shape == "step" and (keys.end_lr or keys.hold_epochs or keys.decay_steps):
        raise RecipeError("schedule.shape: step has no end_lr, hold_epochs or decay_steps: leave them out")
    if not all(0 < a < b for a, b in zip(keys.milestones, [*keys.milestones[1:], math.inf])):
        raise RecipeError(f"schedule.milestones={keys.milestones} must be positive and grow")
