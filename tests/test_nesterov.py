"""Nesterov momentum against the formula in float64, and against torch."""

from __future__ import annotations

import pytest
import torch
from four_steps import BOUND, RATES, gradients, steps, trained, weights

from lars.optim.lars import MOMENTUM_MODES, LARSKeys, MomentumKeys


def in_float64(keys: MomentumKeys) -> list[torch.Tensor]:
    """The docstring's formula, tensor by tensor."""
    params, paper = [p.detach().double() for p in weights()], keys.momentum_mode == "paper"
    velocities = [torch.zeros_like(p) for p in params]
    for step, rate in enumerate(RATES):
        for p, v, g in zip(params, velocities, gradients(step)):
            g, ratio = g.double(), 1.0
            decay = keys.weight_decay if p.ndim > 1 else 0.0
            if isinstance(keys, LARSKeys) and p.ndim > 1:
                ratio = keys.trust_coefficient * p.norm() / (g.norm() + keys.weight_decay * p.norm() + keys.eps)
            d = (rate if paper else 1.0) * ratio * (g + decay * p)
            v.mul_(keys.momentum).add_(d)
            p.sub_((1.0 if paper else rate) * (d + keys.momentum * v))
    return params


@pytest.mark.parametrize("mode", MOMENTUM_MODES)
@pytest.mark.parametrize("name", ["sgd_nesterov", "lars_nesterov"])
def test_the_rule_is_the_formula(name: str, mode: str) -> None:
    kind = {"sgd_nesterov": MomentumKeys, "lars_nesterov": LARSKeys}[name]
    own = {"trust_coefficient": 0.5} if kind is LARSKeys else {}
    keys = kind(name=name, lr=1.0, weight_decay=0.01, momentum=0.9, momentum_mode=mode, **own)
    for p, exact in zip(trained(keys), in_float64(keys)):
        assert float((p - exact).abs().max()) <= BOUND


def test_sgd_is_torchs() -> None:
    keys = MomentumKeys(name="sgd_nesterov", lr=1.0, weight_decay=0.01, momentum=0.9, momentum_mode="torch")
    params = weights()
    torchs = steps(params, torch.optim.SGD(params, lr=1.0, momentum=0.9, weight_decay=0.01, nesterov=True))
    # biases are decayed by torch and not by `sgd`: compare those that have the same rule
    for p, other in zip(trained(keys)[:2], torchs[:2]):
        assert float((p - other).abs().max()) <= BOUND


def test_it_is_not_plain_momentum() -> None:
    keys = {"lr": 1.0, "weight_decay": 0.01, "momentum": 0.9, "momentum_mode": "torch"}
    plain, ahead = (trained(MomentumKeys(name=name, **keys))[0] for name in ("sgd", "sgd_nesterov"))
    assert float((plain - ahead).abs().max()) > 0.1
