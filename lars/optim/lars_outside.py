"""The third LARS rule, as in NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch: rate and trust ratio stand outside the velocity.

    v <- momentum * v + (g + weight_decay * w);   w <- w - rate * ratio * v

The ratio is that of the present step, so the whole velocity is scaled anew in every step. Its clamp is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lars.optim import lars
from lars.optim.key import SHARE, key
from lars.optim.lars import LARS, RatioKeys, Work
from lars.optim.registry import Keys, register


class LARSOutside(LARS):
    """LARS whose velocity holds plain gradients; groups that are not adapted take momentum SGD, rate outside."""

    def rule_of(self, group: dict[str, Any]) -> str:
        return f"{super().rule_of(group)}, ratio outside" if group["adapt"] else super().rule_of(group)

    def update(self, work: Work) -> None:
        torch._foreach_mul_(work.velocities, work.group["momentum"])
        torch._foreach_add_(work.velocities, work.grads)
        if decay := work.group["weight_decay"]:
            torch._foreach_add_(work.velocities, work.params, alpha=decay)
        work.add_scaled(work.params, work.velocities, work.group["lr"], -1)


@dataclass
class OutsideKeys(RatioKeys, Keys):
    momentum: float = key("the share of the velocity that is kept", limit=SHARE)


@register("lars_outside", OutsideKeys)
def build(keys: OutsideKeys, trained: list[torch.nn.Parameter]) -> LARSOutside:
    return lars.build(keys, trained, LARSOutside)
