"""LAMB and AdamW against the formula in float64 and against other packages; clipping against torch."""

from __future__ import annotations

import pytest
import timm.optim
import torch
from four_steps import BOUND, RATES, gradients, steps, trained, weights

from lars.optim import norms
from lars.optim.lamb import LAMB, AdamKeys, LAMBKeys

# `BOUND` counts ten roundings a step of values below 32. Here they are at most twenty of values below 4, which a ratio
# below 3 enlarges (the reference sees that they are): 20 * 4 * 3 instead of 10 * 32.
ADAM = {"lr": 1.0, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "adam_eps": 1e-6}


def in_float64(lamb: bool) -> list[torch.Tensor]:
    """The docstring's formula, tensor by tensor."""
    params = [p.detach().double() for p in weights()]
    firsts, seconds = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for step, rate in enumerate(RATES, 1):
        for p, m, v, g in zip(params, firsts, seconds, gradients(step - 1)):
            g = g.double()
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            d = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-6) + (0.01 if p.ndim > 1 else 0.0) * p
            ratio = float(p.norm() / d.norm()) if lamb and p.ndim > 1 else 1.0
            assert ratio < 3 and d.abs().max() < 4 and p.abs().max() < 4
            p.sub_(rate * ratio * d)
    return params


@pytest.mark.parametrize(("name", "kind"), [("lamb", LAMBKeys), ("adamw", AdamKeys)])
def test_the_rule_is_the_formula(name: str, kind: type[AdamKeys]) -> None:
    for p, exact in zip(trained(kind(name=name, **ADAM)), in_float64(name == "lamb")):
        assert float((p - exact).abs().max()) <= BOUND


def test_lamb_is_timms_without_its_clipping() -> None:
    ours = trained(LAMBKeys(name="lamb", **ADAM))
    params = weights()
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]  # they adapt what is decayed
    timms = steps(params, timm.optim.Lamb(groups, lr=1.0, weight_decay=0.01, max_grad_norm=None))
    for p, other in zip(ours, timms):
        assert float((p - other).abs().max()) <= BOUND


def test_adamw_is_torchs() -> None:
    params = weights()
    torchs = steps(params, torch.optim.AdamW(params[:2], lr=1.0, eps=1e-6, weight_decay=0.01))
    # torch decays first, w (1 - rate decay), which is the same but for rounding
    for p, other in zip(trained(AdamKeys(name="adamw", **ADAM))[:2], torchs):
        assert float((p - other).abs().max()) <= BOUND


def test_a_step_without_its_number_is_refused() -> None:
    params = weights()
    rule = LAMB(params, 1.0)
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(AssertionError, match="number"):
        rule.step()


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_is_torchs(limit: float) -> None:
    ours, theirs = gradients(0), weights()
    before = [g.clone() for g in ours]
    for p, g in zip(theirs, gradients(0)):
        p.grad = g
    norms.clip(ours, limit)
    torch.nn.utils.clip_grad_norm_(theirs, limit)
    for g, p in zip(ours, theirs):
        # a norm of 95 elements, whose relative error is below 95 u in any order of addition, and two more roundings
        assert torch.allclose(g, p.grad, rtol=97 * 2.0**-24, atol=0)
    if limit > 1e3:
        assert all(torch.equal(a, b) for a, b in zip(ours, before))
    else:
        whole = torch.cat([g.reshape(-1) for g in ours]).double().norm()
        assert float(whole) == pytest.approx(limit, rel=1e-5)  # 1e-6 is added to the norm
