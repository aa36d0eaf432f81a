"""The third LARS rule against the formula in float64, and against the two rules that it is not."""

from __future__ import annotations

import torch
from four_steps import BOUND, RATES, gradients, trained, weights

from lars.optim.lars import LARSKeys
from lars.optim.lars_outside import OutsideKeys

RULE = {"lr": 1.0, "weight_decay": 0.01, "momentum": 0.9, "trust_coefficient": 0.5, "eps": 1e-6}


def in_float64() -> list[torch.Tensor]:
    """The docstring's formula, tensor by tensor; biases take momentum SGD without decay."""
    params = [p.detach().double() for p in weights()]
    velocities = [torch.zeros_like(p) for p in params]
    for step, rate in enumerate(RATES):
        for p, v, g in zip(params, velocities, gradients(step)):
            g, ratio, decay = g.double(), 1.0, 0.0
            if p.ndim > 1:
                decay = RULE["weight_decay"]
                ratio = RULE["trust_coefficient"] * p.norm() / (g.norm() + decay * p.norm() + RULE["eps"])
            v.mul_(RULE["momentum"]).add_(g + decay * p)
            p.sub_(rate * ratio * v)
    return params


def test_the_rule_is_the_formula() -> None:
    for p, exact in zip(trained(OutsideKeys(name="lars_outside", **RULE)), in_float64()):
        assert float((p - exact).abs().max()) <= BOUND


def test_it_is_neither_of_the_other_two() -> None:
    ours = trained(OutsideKeys(name="lars_outside", **RULE))[0]
    for mode in ("paper", "torch"):
        other = trained(LARSKeys(name="lars", momentum_mode=mode, **RULE))[0]
        assert float((ours - other).abs().max()) > 10 * BOUND
