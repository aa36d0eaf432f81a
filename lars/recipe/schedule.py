"""The learning rate as a pure function of the step: warm-up, then polynomial decay.

The loop sets it on the parameter groups before each optimizer step. A prepared scheduler would step once per process
(accelerate issue 2318), and the rate would depend on their number.
"""

from __future__ import annotations

from dataclasses import dataclass

from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe


@dataclass(frozen=True)
class Schedule:
    """Warm-up to `lr` over `warmup_steps`, then decay to `end_lr`. Steps may be fractional, so knots can be tested.

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

    @classmethod
    def of(cls, recipe: Recipe, plan: BatchPlan) -> Schedule:
        """Epochs to steps: warm-up ends after warmup_epochs * N / B steps, decay after decay_steps or with the run."""
        keys = recipe.schedule
        warmup = keys.warmup_epochs * plan.samples / plan.global_batch
        decay = keys.decay_steps or plan.horizon - (warmup if keys.decay_from == "warmup_end" else 0.0)
        ramp = (recipe.optimizer.lr, keys.warmup_lr, warmup, keys.warmup_power)
        return cls(*ramp, keys.decay_from, decay, keys.power, keys.end_lr)

    def rate(self, step: float) -> float:
        """The rate of the update that follows `step` finished updates (0 for the first)."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.lr - self.warmup_lr) * (step / self.warmup_steps) ** self.warmup_power
        counted = step if self.decay_from == "start" else step - self.warmup_steps
        left = max(0.0, 1.0 - counted / self.decay_steps)
        return self.end_lr + (self.lr - self.end_lr) * left**self.power
