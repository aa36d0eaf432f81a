"""Batch norm over groups of exactly `bn_group` consecutive slots, whatever the number of processes.

The group is a property of the recipe (MLPerf's `model_bn_span`; Hoffer, Hubara, Soudry 2017 call it ghost batch norm).
Running statistics do not move during a forward: the groups' means and unbiased variances of a whole step are averaged
over all processes by the order-free sum and applied once per step, so that the buffers are equal on all ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GhostBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over groups of `bn_group` samples; in evaluation and in its state dict an ordinary one."""

    running_mean: Tensor  # always there: `convert` refuses a norm without running averages
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, norm: nn.BatchNorm2d, bn_group: int) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(self, name, getattr(norm, name))
        self.bn_group = bn_group
        # timm's BatchNormAct2d is a batch norm that ends in a dropout and an activation
        self.drop = getattr(norm, "drop", None)
        self.act = getattr(norm, "act", None)
        # (2, C): sums over this forward's groups of mean and unbiased variance, float64 if there is more than one
        self.group_sums: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self._normalise(x) if self.training else super().forward(x)
        for module in (self.drop, self.act):
            x = x if module is None else module(x)
        return x

    def _normalise(self, x: Tensor) -> Tensor:
        groups: list[Tensor] = []
        sums: Tensor | None = None
        # One group is as cheap as nn.BatchNorm2d: nothing is cut, added or put together.
        for group in (x,) if len(x) == self.bn_group else x.split(self.bn_group):
            # With momentum 1 torch writes the group's own mean and unbiased variance into the "running" buffers.
            statistics = self.running_mean.new_zeros(2, self.num_features)
            mean, variance = statistics.unbind()
            groups.append(F.batch_norm(group, mean, variance, self.weight, self.bias, True, 1.0, self.eps))
            sums = statistics if sums is None else sums.double() + statistics
        # Assigned, not added: activation checkpointing runs the forward again during backward.
        self.group_sums = sums
        return groups[0] if len(groups) == 1 else torch.cat(groups)


@torch.no_grad()
def update_running(ghosts: list[GhostBatchNorm2d], means: Tensor) -> None:
    """One step of the running averages.

    Args:
        means: of mean and unbiased variance over all groups of an optimizer step, one norm's C means and C variances
            after the other's, on the averages' device.
    """
    averages = [average for ghost in ghosts for average in (ghost.running_mean, ghost.running_var)]
    parts = means.to(averages[0].dtype).split([len(average) for average in averages])
    momenta = [ghost.momentum for ghost in ghosts for _ in range(2)]
    for momentum in set(momenta):  # as a rule there is one, and one call
        those = [number for number, other in enumerate(momenta) if other == momentum]
        torch._foreach_lerp_([averages[number] for number in those], [parts[number] for number in those], momentum)
    torch._foreach_add_([ghost.num_batches_tracked for ghost in ghosts], 1)


def convert(model: nn.Module, bn_group: int | None) -> list[GhostBatchNorm2d]:
    """Replace every BatchNorm2d of the model and return the new ones in order.

    Raises:
        ValueError: the model has batch norm and the recipe no `bn_group` (or the reverse), or it has a kind of batch
            norm whose groups cannot be controlled.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.modules.batchnorm._BatchNorm)
    ]
    for _, name, norm in found:
        if not isinstance(norm, nn.BatchNorm2d) or norm.momentum is None or not norm.track_running_stats:
            raise ValueError(
                f"{name}: {type(norm).__name__} cannot be cut into bn_group; use BatchNorm2d with running averages"
            )
    if found and bn_group is None:
        raise ValueError(
            f"the model has {len(found)} batch norms: say how many samples share statistics, as in bn_group=32"
        )
    if bn_group is not None and not found:
        raise ValueError("the model has no batch norm: write bn_group=null")
    ghosts = [GhostBatchNorm2d(norm, bn_group or 1) for _, _, norm in found if isinstance(norm, nn.BatchNorm2d)]
    for (parent, name, _), ghost in zip(found, ghosts):
        setattr(parent, name, ghost)
    return ghosts
