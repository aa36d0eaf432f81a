"""Mixup and cutmix inside each batch-norm group, keyed by (seed, step, group): the same at any number of processes.

timm mixes a whole batch with its reverse, which would make the run depend on `micro_batch`; here each group of
`bn_group` slots is mixed with its own reverse. Without batch norm the groups are pairs of slots.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lars.exact.keyed import MixDraw, Purpose, uniform
from lars.recipe.keys import Recipe

_TRIES = 64  # of Johnk's method for Beta(alpha, alpha); at alpha = 1 it fails once in 2^64


def group_size(recipe: Recipe) -> int | None:
    """Slots that are mixed with each other; None if the recipe does not mix."""
    return (recipe.bn_group or 2) if recipe.augment.mixup or recipe.augment.cutmix else None


def mix(images: Tensor, labels: Tensor, recipe: Recipe, step: int, first_slot: int) -> tuple[Tensor, Tensor]:
    """Mixed images, and targets (n, num_classes) instead of labels.

    Args:
        images: float (n, 3, height, width), normalised; they begin at `first_slot` of the step and are whole groups.
        labels: int64 (n,).
    """
    size, targets = group_size(recipe), F.one_hot(labels, recipe.model.num_classes).float()
    mixed = [
        _mix_group(*part, recipe, step, first_slot // size + number)
        for number, part in enumerate(zip(images.split(size), targets.split(size)))
    ]
    return torch.cat([pixels for pixels, _ in mixed]), torch.cat([target for _, target in mixed])


def _mix_group(images: Tensor, targets: Tensor, recipe: Recipe, step: int, group: int) -> tuple[Tensor, Tensor]:
    augment, draws = recipe.augment, uniform(MixDraw.SHARE + 2 * _TRIES, recipe.seed, Purpose.MIX, step, group).tolist()
    cut = augment.cutmix > 0 and (augment.mixup == 0 or draws[MixDraw.CUT] < 0.5)
    share = _beta(augment.cutmix if cut else augment.mixup, draws[MixDraw.SHARE : MixDraw.SHARE + 2 * _TRIES])
    if cut:
        height, width = images.shape[2:]
        side = math.sqrt(1 - share)
        top, bottom = _span(draws[MixDraw.CENTRE_DOWN], side, height)
        left, right = _span(draws[MixDraw.CENTRE_ACROSS], side, width)
        other, images = images.flip(0), images.clone()
        images[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)  # what the edges of the image left of the box
    else:
        images = images * share + images.flip(0) * (1 - share)
    return images, targets * share + targets.flip(0) * (1 - share)


def _span(centre: float, side: float, extent: int) -> tuple[int, int]:
    half, middle = int(side * extent) // 2, int(centre * extent)
    return max(0, middle - half), min(extent, middle + half)


def _beta(alpha: float, draws: list[float]) -> float:
    """A number from Beta(alpha, alpha) (Johnk 1964), since numpy may change its streams between releases."""
    for u, v in zip(draws[::2], draws[1::2]):
        x, y = u ** (1 / alpha), v ** (1 / alpha)
        if 0 < x + y <= 1:
            return x / (x + y)
    return 0.5
