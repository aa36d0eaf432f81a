"""Slots, passes and processes: the arithmetic of a step, refused where it does not come out even.

A step consumes `global_batch` slots. A pass is one forward and backward over `micro_batch` consecutive slots; a step
has V = global_batch / micro_batch passes. Each of W processes plays V / W of them in a row, rounded down or up where
the order-free sum adds them, which does not mind; every other engine needs a W that divides V. `bn_group` consecutive
slots share batch-norm statistics, inside one pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lars.recipe.keys import Recipe
from lars.recipe.refusal import RecipeError

MOST_STEPS = 10**8  # a checkpoint's name has eight digits for its step


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic of one run; every number in it is printed at the start."""

    samples: int
    global_batch: int
    micro_batch: int
    bn_group: int | None
    processes: int
    epochs: float

    @classmethod
    def of(cls, recipe: Recipe, samples: int, processes: int, even: bool = True) -> BatchPlan:
        """Check and collect the numbers.

        Args:
            even: whether every process has to play as many passes as the others.

        Raises:
            RecipeError: something does not divide (the message names the nearest values that do), or the data set has
                fewer samples than one global batch.
        """
        batch, group = recipe.global_batch, recipe.bn_group
        if processes < 1:
            raise RecipeError(f"{processes} processes: at least one is needed")
        if samples < batch:  # first: what follows looks for divisors
            largest = _largest(recipe, samples, processes, even)
            works = f"works on {processes} processes"
            remedy = f"the largest that {works} is {largest}" if largest else f"none {works}"
            raise RecipeError(f"the training split has {samples} samples, fewer than global_batch={batch}: {remedy}")
        if group and batch % group:
            remedy = _nearest(group, _divisors(batch))
            raise RecipeError(f"bn_group={group} does not divide global_batch={batch}: {remedy}")
        micro = recipe.runtime.micro_batch or group or math.gcd(batch, 64)
        allowed = [d for d in _divisors(batch) if d % (group or 1) == 0]
        if batch % micro or micro % (group or 1):
            multiple = f" and is no multiple of bn_group={group}" if micro % (group or 1) else ""
            remedy = _nearest(micro, allowed)
            raise RecipeError(f"runtime.micro_batch={micro} does not divide global_batch={batch}{multiple}: {remedy}")
        if (recipe.augment.mixup or recipe.augment.cutmix) and micro % 2:
            raise RecipeError(f"augment.mixup and augment.cutmix mix pairs: runtime.micro_batch={micro} must be even")
        passes = batch // micro
        if not _can_share(passes, processes, even):
            admits = [m for m in allowed if _can_share(batch // m, processes, even)]
            remedy = ""
            if admits:
                remedy = f", or runtime.micro_batch={max((m for m in admits if m <= micro), default=admits[0])}"
            counts = _divisors(passes) if even else [passes]
            raise RecipeError(
                f"{processes} processes {'do not divide' if even else 'are more than'} the {passes} passes of a step "
                f"(global_batch={batch} / micro_batch={micro}): {_nearest(processes, counts)} processes{remedy}"
            )
        plan = cls(samples, batch, micro, group, processes, recipe.epochs)
        if plan.horizon >= MOST_STEPS:
            steps = f"{plan.horizon:,.4g} steps of global_batch={batch}"
            raise RecipeError(f"epochs={recipe.epochs:g} are {steps}: a run has fewer than {MOST_STEPS:,}")
        return plan

    @property
    def passes(self) -> int:
        """V: passes of one step, over all processes."""
        return self.global_batch // self.micro_batch

    @property
    def passes_per_process(self) -> int:
        """The most that a process plays in a step: ceil(V / W)."""
        return -(-self.passes // self.processes)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run: round(epochs * N / B), at least 1."""
        return max(1, round(self.horizon))

    @property
    def horizon(self) -> float:
        """epochs * N / B, not rounded: the schedule's unit of length."""
        return self.epochs * self.samples / self.global_batch

    def evaluation_steps(self, epochs: Iterable[int]) -> list[int]:
        """The evaluation of an epoch e is after step ceil(e * N / B); the last one after the last step."""
        ends = (math.ceil(e * self.samples / self.global_batch) for e in epochs)
        return sorted({step for step in ends if step < self.steps} | {self.steps})

    def ends_hundredth(self, step: int) -> bool:
        """Whether a hundredth of the run ends with this many steps: when what is too long for every step is logged."""
        return step * 100 // self.steps > (step - 1) * 100 // self.steps

    def local_passes(self, rank: int) -> range:
        """The indices of the passes that this process plays in every step: floor(V / W) or ceil(V / W) of them."""
        return range(rank * self.passes // self.processes, (rank + 1) * self.passes // self.processes)

    def start_up_line(self) -> str:
        """Every batch number, with its full name, in one line."""
        groups = "no batch norm"
        if self.bn_group:
            groups = f"{self.micro_batch // self.bn_group} of bn_group {self.bn_group}"
        fewest, most = self.passes // self.processes, self.passes_per_process
        shared = f"{self.processes} processes x {most} passes"
        if fewest < most:
            shared = f"{self.passes} passes (on {self.processes} processes, {fewest} or {most} each)"
        return (
            f"global_batch {self.global_batch} = {shared} x micro_batch {self.micro_batch} ({groups}) | "
            f"{self.samples:,} samples x {self.epochs:g} epochs = {self.steps:,} steps"
        )


def _can_share(passes: int, processes: int, even: bool) -> bool:
    return passes % processes == 0 if even else passes >= processes


def _largest(recipe: Recipe, samples: int, processes: int, even: bool) -> int | None:
    """The largest global_batch of at most `samples` that a step of so many processes can be made of."""
    group, own = recipe.bn_group or 1, recipe.runtime.micro_batch or recipe.bn_group
    for batch in range(samples, 0, -1):
        micro = own or math.gcd(batch, 64)
        if batch % micro == 0 and micro % group == 0 and _can_share(batch // micro, processes, even):
            return batch
    return None


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _nearest(value: int, allowed: list[int]) -> str:
    below = [d for d in allowed if d < value][-1:]
    above = [d for d in allowed if d > value][:1]
    return "use " + " or ".join(str(d) for d in below + above)
