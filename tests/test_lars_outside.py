"""The third LARS rule against the formula in float64, and against the two rules that it is not."""

from __future__ import annotations

import torch

from lars.optim.lars import LARSKeys
from lars.optim.lars_outside import OutsideKeys
from lars.optim.registry import Keys, optimizers

U, RATES = 2.0**-24, (0.5, 0.25, 0.5, 1.0)
RULE = {"lr": 1.0, "weight_decay": 0.01, "momentum": 0.9, "trust_coefficient": 0.5, "eps": 1e-6}

# Ten roundings a step, each of at most u of the largest value on the way: below 32, since four steps of rate at most 1
# and momentum 0.9 move a weight by at most 4 * 3.5 of |g| < 2 each; none grows from step to step.
BOUND = len(RATES) * 10 * U * 32


def weights() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 5), (3, 4, 2, 2), (7,))]


def gradients(step: int) -> list[torch.Tensor]:
    torch.manual_seed(100 + step)
    return [torch.randn_like(p) for p in weights()]


def trained(keys: Keys) -> list[torch.Tensor]:
    params = weights()
    optimizer = optimizers()[keys.name].build(keys, params)
    for step, rate in enumerate(RATES):
        for p, g in zip(params, gradients(step)):
            p.grad = g.clone()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return [p.detach() for p in params]


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
