"""Four steps of an optimizer on three small tensors, for the tests that compare a rule with its formula."""

from __future__ import annotations

import torch

from lars.optim.registry import Keys, optimizers

U = 2.0**-24  # float32's unit roundoff
RATES = (0.5, 0.25, 0.5, 1.0)  # the rules differ only where the rate changes

# Ten roundings a step, each of at most u of the largest value on the way; none grows from step to step. That value is
# below 32: a weight begins below 2.8 and moves by at most the sum of the rates, 2.25, times 1 + 0.9 * 3.44 (momentum of
# 0.9 over four steps, one of them ahead) times a decayed gradient of at most 2.8 (a ratio is below 1 here).
BOUND = len(RATES) * 10 * U * 32


def weights() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 5), (3, 4, 2, 2), (7,))]


def gradients(step: int) -> list[torch.Tensor]:
    like = weights()  # which seeds too
    torch.manual_seed(100 + step)
    return [torch.randn_like(p) for p in like]


def steps(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The weights after a step at each of RATES."""
    for step, rate in enumerate(RATES):
        for p, g in zip(params, gradients(step)):
            p.grad = g
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.updates = step + 1
        optimizer.step()
    return [p.detach() for p in params]


def trained(keys: Keys) -> list[torch.Tensor]:
    """The weights after four steps of the optimizer that `keys` name."""
    params = weights()
    return steps(params, optimizers()[keys.name].build(keys, params))
