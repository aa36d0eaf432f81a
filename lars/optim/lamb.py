"""LAMB and AdamW: Adam's direction, which LAMB gives a rate of its own for every weight tensor.

LAMB as in algorithm 2 of You et al. 2020 (arXiv 1904.00962), with bias correction and without a bound on |w|:

    m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
    d = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w
    w <- w - rate * ratio * d,      ratio = |w| / |d|, 1 where |w| or |d| is 0

With a ratio of 1 it is AdamW (Loshchilov and Hutter 2019), whose decay is multiplied by the rate as torch does it. The
norms are those of whole tensors under every engine (deepspeedai/DeepSpeed issue 1217). No gradient is clipped here:
`clip_norm` does that for any optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lars.optim.key import POSITIVE, SHARE, key
from lars.optim.lars import LARS, Work
from lars.optim.registry import Keys, register


class LAMB(LARS):
    """LARS on Adam's direction; groups that are not adapted take AdamW. Split by dimension as LARS is.

    `updates`, the number of the update, has to be set before each `step()`; the engines do so.
    """

    state_tensors = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, 0.0, weight_decay, trust_coefficient=1.0, decay_in_norm=False)
        self.defaults |= {"betas": betas, "adam_eps": adam_eps}

    def rule_of(self, group: dict[str, Any]) -> str:
        return "LAMB" if group["adapt"] else "AdamW"

    def _work(self, group: dict[str, Any]) -> Work:
        work = super()._work(group)
        if work.params:
            work.grads = self._directions(work)  # so that the ratio is that of the direction
        return work

    def _directions(self, work: Work) -> list[Tensor]:
        """d of each tensor, and m and v moved on.

        The root is 1 / (1 / sqrt(x)): torch's own square root on a CPU is MKL's, whose last bit depends on the
        processor's kind, and its reciprocal root is not.
        """
        (beta1, beta2), updates = self.defaults["betas"], self.updates
        assert updates > 0, "set `updates` to the number of this update, from 1"
        torch._foreach_lerp_(work.velocities, work.grads, 1 - beta1)
        torch._foreach_mul_(work.squares, beta2)
        torch._foreach_addcmul_(work.squares, work.grads, work.grads, value=1 - beta2)
        roots = torch._foreach_div(work.squares, 1 - beta2**updates)
        torch._foreach_rsqrt_(roots)
        torch._foreach_reciprocal_(roots)
        torch._foreach_add_(roots, self.defaults["adam_eps"])
        directions = torch._foreach_div(work.velocities, 1 - beta1**updates)
        torch._foreach_div_(directions, roots)
        if decay := work.group["weight_decay"]:
            torch._foreach_add_(directions, work.params, alpha=decay)
        return list(directions)

    def update(self, work: Work) -> None:
        work.add_scaled(work.params, work.grads, work.group["lr"], -1)


@dataclass
class AdamKeys(Keys):
    beta1: float = key("the share of the mean gradient that is kept", limit=SHARE)
    beta2: float = key("the share of the mean squared gradient that is kept", limit=SHARE)
    adam_eps: float = key("added to the root of the mean squared gradient", limit=POSITIVE)


@dataclass
class LAMBKeys(AdamKeys):
    adapt_1d: bool = key("true: biases and norm scales are adapted and decayed too", False)


def _build(keys: AdamKeys, groups: list) -> LAMB:
    return LAMB(groups, keys.lr, (keys.beta1, keys.beta2), keys.adam_eps, keys.weight_decay)


@register("lamb", LAMBKeys)
def build_lamb(keys: LAMBKeys, trained: list[torch.nn.Parameter]) -> LAMB:
    every = [{"params": trained, "adapt": True, "weight_decay": keys.weight_decay}]
    return _build(keys, every if keys.adapt_1d else trained)


@register("adamw", AdamKeys)
def build_adamw(keys: AdamKeys, trained: list[torch.nn.Parameter]) -> LAMB:
    return _build(keys, [{"params": trained, "adapt": False}])
