"""What changes with the step, as pure functions of it: the learning rate (warm-up, then decay), the images' size.

The loop sets it on the parameter groups before each optimizer step. A prepared scheduler would step once per process
(accelerate issue 2318), and the rate would depend on their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe


def evaluation_epochs(recipe: Recipe) -> range:
    """The epochs after which a run is evaluated, beside its end."""
    every = recipe.evaluation.every_epochs or (4 if recipe.mllog else 1)
    return range(recipe.evaluation.first_epoch or every, math.ceil(recipe.epochs), every)


def training_size(recipe: Recipe, epoch: float) -> int:
    """Pixels of a side of the training images of a step that begins so many epochs after the run's beginning.

    Progressive resizing: small images cost less, and the first epochs do with them (FFCV, Leclerc et al. 2023).
    """
    return training_sizes(recipe)[sum(epoch >= begin for begin in recipe.augment.size_epochs)]


def training_sizes(recipe: Recipe) -> list[int]:
    """The sides of the training images of a run, one after the other."""
    return recipe.augment.sizes or [recipe.model.image_size]


@dataclass(frozen=True)
class Schedule:
    """Warm-up to `lr` over `warmup_steps`, then decay to `end_lr`. Steps may be fractional, so knots can be tested.

    shape: "polynomial" and "cosine" (Loshchilov and Hutter 2017, without restarts) fall from `lr` to `end_lr`. "step"
        multiplies `lr` by `gamma` at each of `milestones`, as torch's MultiStepLR.
    hold_steps: how much later decay begins to count: warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395).

    decay_from: "start" counts the decay from step 0, so that the rate falls at the end of warm-up: 32 to 25.92 in the
        LARS authors' own 32K solver (nvcaffe, `solver_32k.prototxt`). "warmup_end" is continuous.
    decay_steps: steps from where decay is counted until `end_lr` is reached; it stays there.
    warmup_power: 1 is linear, 2 is that solver's quadratic.
    """

    lr: float
    warmup_lr: float
    warmup_steps: float
    warmup_power: float
    decay_from: str
    decay_steps: float
    power: float
    end_lr: float
    shape: str = "polynomial"
    hold_steps: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1

    @classmethod
    def of(cls, recipe: Recipe, plan: BatchPlan) -> Schedule:
        """Epochs to steps: warm-up ends after warmup_epochs * N / B steps, decay after decay_steps or with the run."""
        keys = recipe.schedule

        def steps(epochs: float) -> float:
            return epochs * plan.samples / plan.global_batch

        warmup, hold = steps(keys.warmup_epochs), steps(keys.hold_epochs)
        decay = keys.decay_steps or plan.horizon - (warmup if keys.decay_from == "warmup_end" else 0.0) - hold
        ramp = (recipe.optimizer.lr, keys.warmup_lr, warmup, keys.warmup_power)
        drops = tuple(map(steps, keys.milestones))
        return cls(*ramp, keys.decay_from, decay, keys.power, keys.end_lr, keys.shape, hold, drops, keys.gamma)

    def rate(self, step: float) -> float:
        """The rate of the update that follows `step` finished updates (0 for the first)."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.lr - self.warmup_lr) * (step / self.warmup_steps) ** self.warmup_power
        if self.shape == "step":
            return self.lr * self.gamma ** sum(step >= drop for drop in self.milestones)
        counted = (step if self.decay_from == "start" else step - self.warmup_steps) - self.hold_steps
        left = min(1.0, max(0.0, 1.0 - counted / self.decay_steps))
        if self.shape == "cosine":
            left = (1.0 - math.cos(math.pi * left)) / 2
        return self.end_lr + (self.lr - self.end_lr) * left**self.power
