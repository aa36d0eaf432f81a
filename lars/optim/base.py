"""What engines and checkpoints ask of an optimizer, whichever it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ShardingError(RuntimeError):
    """The optimizer would see slices of weights where its rule needs whole ones."""


class Optimizer(torch.optim.Optimizer):
    """A torch optimizer that says what its state is and what it makes of an engine's slices.

    `state_tensors` are the names of its state's tensors, each of its parameter's shape and zero before the first step.
    `layout` is set by `lars.bind` where an engine keeps slices. `slices` says what those mean for the rule: "bound", it
    works on them by way of `layout`; "elementwise", it treats each element alone, so that a slice is as good as a whole
    tensor; "refused", it needs whole tensors.
    """

    state_tensors: tuple[str, ...] = ()
    slices = "refused"
    layout: Any = None  # lars.optim.sharding.Layout
    updates = 0  # the number of the update under way, from 1; the engine sets it, since a ZeRO stage steps by group

    def state_key(self, parameter: str, tensor: str) -> str:
        """How a checkpoint names a tensor of a parameter's state: the first one by the parameter alone."""
        return parameter if tensor == self.state_tensors[0] else f"{parameter}/{tensor}"

    def rule_of(self, group: dict[str, Any]) -> str:
        """What to call the rule that a parameter group follows."""
        return type(self).__name__

    def refuse_slices(self) -> None:
        """Raise ShardingError if an engine has put slices in place of the tensors that were given."""

    def applied_ratios(self) -> dict[Tensor, float]:
        """{model's parameter: trust ratio of its last update}, for rules that have one."""
        return {}
