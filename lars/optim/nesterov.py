"""Nesterov momentum for SGD and LARS, as in torch.optim.SGD and in Nado et al. 2021 (arXiv 2102.06356).

    d <- ratio * (g + weight_decay * w);   v <- momentum * v + d;   w <- w - rate * (d + momentum * v)

With `momentum_mode: paper` the rate stands in d, inside the velocity, and not before the brackets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lars.optim import lars, sgd
from lars.optim.lars import LARS, LARSKeys, MomentumKeys, Work, rates
from lars.optim.registry import register


class Nesterov(LARS):
    """LARS, or momentum SGD where a group is not adapted, that looks one step ahead along its velocity."""

    def rule_of(self, group: dict[str, Any]) -> str:
        return f"{super().rule_of(group)}, Nesterov"

    def update(self, work: Work) -> None:
        (inside, outside), momentum = rates(work.group), work.group["momentum"]
        scales: Sequence[float | Tensor] = [inside] * len(work.params)
        if work.ratios is not None:
            scales = (inside * work.ratios).unbind()
        for p, g, v, scale in zip(work.params, work.grads, work.velocities, scales):
            pushed = torch.add(g, p, alpha=work.group["weight_decay"]).mul_(scale)
            v.mul_(momentum).add_(pushed)
            p.sub_(pushed.add_(v, alpha=momentum), alpha=outside)


@register("sgd_nesterov", MomentumKeys)
def build_sgd(keys: MomentumKeys, trained: list[torch.nn.Parameter]) -> Nesterov:
    return sgd.build(keys, trained, Nesterov)


@register("lars_nesterov", LARSKeys)
def build_lars(keys: LARSKeys, trained: list[torch.nn.Parameter]) -> Nesterov:
    return lars.build(keys, trained, Nesterov)
