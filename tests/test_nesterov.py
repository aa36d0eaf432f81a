"""Nesterov momentum against the formula in float64, and against torch."""

from __future__ import annotations

import pytest
import torch

from lars.optim.lars import MOMENTUM_MODES, LARSKeys, MomentumKeys
from lars.optim.registry import optimizers

U, STEPS = 2.0**-24, 4
RATES = (0.5, 0.25, 0.5, 1.0)  # the modes differ only where the rate changes


def weights() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 5), (3, 4, 2, 2), (7,))]


def gradients(step: int) -> list[torch.Tensor]:
    torch.manual_seed(100 + step)
    return [torch.randn_like(p) for p in weights()]


def trained(name: str, keys: MomentumKeys) -> list[torch.Tensor]:
    params = weights()
    optimizer = optimizers()[name].build(keys, params)
    for step, rate in enumerate(RATES):
        for p, g in zip(params, gradients(step)):
            p.grad = g.clone()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return [p.detach() for p in params]


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
    for p, exact in zip(trained(name, keys), in_float64(keys)):
        # Ten roundings a step, each of at most u of the largest value on the way (below 32 here: four steps of rate at
        # most 1 and momentum 0.9 add at most 4 * (1 + 0.9 * 3.4) of |g| < 4), and none grows from step to step.
        assert float((p - exact).abs().max()) <= STEPS * 10 * U * 32


def test_sgd_is_torchs() -> None:
    keys = MomentumKeys(name="sgd_nesterov", lr=1.0, weight_decay=0.01, momentum=0.9, momentum_mode="torch")
    params = weights()
    torchs = torch.optim.SGD(params, lr=1.0, momentum=0.9, weight_decay=0.01, nesterov=True)
    for step, rate in enumerate(RATES):
        for p, g in zip(params, gradients(step)):
            p.grad = g.clone()
        torchs.param_groups[0]["lr"] = rate
        torchs.step()
    # biases are decayed by torch and not by `sgd`: compare those that have the same rule
    for p, other in zip(trained("sgd_nesterov", keys)[:2], params[:2]):
        assert float((p - other.detach()).abs().max()) <= STEPS * 10 * U * 32


def test_it_is_not_plain_momentum() -> None:
    keys = MomentumKeys(name="sgd", lr=1.0, weight_decay=0.01, momentum=0.9, momentum_mode="torch")
    assert float((trained("sgd", keys)[0] - trained("sgd_nesterov", keys)[0]).abs().max()) > 0.1
