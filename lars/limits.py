"""What the keys of a recipe may be, one by one and together; checked before any process group is built."""
from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from lars import pretrained
from lars.refusal import RecipeError, did_you_mean

if TYPE_CHECKING:  # it knows this file
    from lars.config import Recipe

_CHOICES = {
    "augment.crop": ("random_resized_crop", "random_crop"),
    "optimizer.name": ("lars", "sgd"),
    "optimizer.momentum_mode": ("paper", "torch"),
    "schedule.decay_from": ("start", "warmup_end"),
    "precision": ("fp32", "tf32", "bf16"),
    "checkpoint.on_error": ("go_on", "stop"),
}

_POSITIVE, _NOT_NEGATIVE, _SHARE = "must be positive", "must not be negative", "must lie in [0, 1)"
_LIMITS = {
    "model.num_classes": _POSITIVE,
    "model.image_size": _POSITIVE,
    "data.max_bad_fraction": _SHARE,
    "data.workers": _POSITIVE,
    "data.retry_seconds": _POSITIVE,
    "augment.resize": _POSITIVE,
    "augment.pad": _NOT_NEGATIVE,
    "augment.flip": "must lie in [0, 1]",
    "augment.erase": "must lie in [0, 1]",
    "augment.mixup": _NOT_NEGATIVE,
    "augment.cutmix": _NOT_NEGATIVE,
    "augment.eval_resize": _POSITIVE,
    "augment.label_smoothing": _SHARE,
    "global_batch": _POSITIVE,
    "bn_group": _POSITIVE,
    "optimizer.lr": _POSITIVE,
    "optimizer.momentum": _SHARE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.trust_coefficient": _POSITIVE,
    "optimizer.eps": _NOT_NEGATIVE,
    "schedule.warmup_epochs": _NOT_NEGATIVE,
    "schedule.warmup_lr": _NOT_NEGATIVE,
    "schedule.warmup_power": _POSITIVE,
    "schedule.decay_steps": _POSITIVE,
    "schedule.power": _POSITIVE,
    "schedule.end_lr": _NOT_NEGATIVE,
    "epochs": _POSITIVE,
    "seed": _NOT_NEGATIVE,
    "runtime.micro_batch": _POSITIVE,
    "runtime.hang_seconds": _POSITIVE,
    "max_steps": _POSITIVE,
    "checkpoint.every_steps": _POSITIVE,
    "checkpoint.keep": _POSITIVE,
}
_HOLDS = {
    _POSITIVE: lambda x: x > 0,
    _NOT_NEGATIVE: lambda x: x >= 0,
    _SHARE: lambda x: 0 <= x < 1,
    "must lie in [0, 1]": lambda x: 0 <= x <= 1,
}


def check(recipe: Recipe, flat: dict[str, Any]) -> None:
    """Refuse what cannot be trained.

    Args:
        flat: the same recipe by flat keys.

    Raises:
        RecipeError: names the key and what it may be.
    """
    plain = PurePosixPath(recipe.name)
    odd = not recipe.name.isprintable() or str(plain) != recipe.name
    if odd or plain.is_absolute() or {"..", "."} & {*plain.parts, recipe.name}:
        raise RecipeError(
            f"name={recipe.name!r} names the folder runs/<name>: write a relative path without .., as in resnet50/mine"
        )
    if "\0" in (recipe.run_dir or ""):
        raise RecipeError(f"run_dir={recipe.run_dir!r} is no path")
    for key, allowed in _CHOICES.items():
        if flat[key] not in allowed:
            raise RecipeError(f"{key}={flat[key]} is unknown: use {' or '.join(allowed)}{did_you_mean(flat[key], allowed)}")
    for key, value in flat.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise RecipeError(f"{key}={value} is not finite")
    for key, limit in _LIMITS.items():
        if flat[key] is not None and not _HOLDS[limit](flat[key]):
            raise RecipeError(f"{key}={flat[key]} {limit}")
    for key in ("scale", "ratio"):
        value = flat[f"augment.{key}"]
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            raise RecipeError(f"augment.{key}={value} must be two positive numbers, smaller first")
    if recipe.augment.scale[1] > 1:
        raise RecipeError(f"augment.scale={recipe.augment.scale}: a crop has at most the area of its image, 1.0")
    if len(recipe.augment.mean) != 3 or len(recipe.augment.std) != 3 or min(recipe.augment.std) <= 0:
        raise RecipeError("augment.mean and augment.std must be three numbers each (red, green, blue in 0 ... 255), std positive")
    remedy = "pixels of 0 ... 255: multiply values of 0 ... 1 by 255"
    if not 0 <= min(recipe.augment.mean) <= max(recipe.augment.mean) <= 255 or 0 < max(recipe.augment.mean) <= 1:
        raise RecipeError(f"augment.mean={recipe.augment.mean} is subtracted from {remedy}")
    if max(recipe.augment.std) < 1:
        raise RecipeError(f"augment.std={recipe.augment.std} divides {remedy}")
    if recipe.augment.eval_resize < recipe.model.image_size:
        raise RecipeError(
            f"augment.eval_resize={recipe.augment.eval_resize} is smaller than model.image_size={recipe.model.image_size}"
        )
    if recipe.augment.randaugment is not None and not recipe.augment.randaugment.startswith("rand"):
        raise RecipeError(f"augment.randaugment={recipe.augment.randaugment} is no policy of timm: write it as in rand-m9-mstd0.5-inc1")
    if recipe.data.retry_seconds >= recipe.runtime.hang_seconds:
        raise RecipeError(
            f"data.retry_seconds={recipe.data.retry_seconds:g} must be below runtime.hang_seconds={recipe.runtime.hang_seconds:g}, "
            "or the run would be ended as hanging first"
        )
    if recipe.runtime.portable and recipe.runtime.compile:
        raise RecipeError(
            "runtime.compile=true makes kernels for this CPU, which runtime.portable=true excludes: set one of them to false"
        )
    if recipe.seed >= 2**63:
        raise RecipeError(f"seed={recipe.seed} does not fit 63 bits")
    if recipe.schedule.warmup_epochs >= recipe.epochs:
        raise RecipeError(f"schedule.warmup_epochs={recipe.schedule.warmup_epochs:g} must be below epochs={recipe.epochs:g}")
    if recipe.optimizer.name == "lars" and None in (recipe.optimizer.trust_coefficient, recipe.optimizer.eps):
        raise RecipeError("optimizer.name=lars needs numbers for optimizer.trust_coefficient and optimizer.eps (0.001 and 0.0)")
    if recipe.optimizer.name == "lars" and None in (recipe.optimizer.decay_in_norm, recipe.optimizer.adapt_1d):
        raise RecipeError("optimizer.name=lars needs true or false for optimizer.decay_in_norm and optimizer.adapt_1d (true and false)")
    pretrained.weights_file(recipe.model.kwargs)
