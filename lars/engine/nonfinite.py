"""Where a loss or a gradient first stopped being a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from accelerate.utils import gather_object
from torch import nn

from lars.data.loader import Batch
from lars.engine.base import Engine


def explain_nonfinite(engine: Engine, step: int, passes: Iterable[tuple[int, Batch]], bad_gradients: list[str]) -> None:
    """End the run after `step`: play the step's passes again on all processes (weights may have to be gathered).

    Args:
        passes: the number of each of this process's passes, and its samples.

    Raises:
        FloatingPointError: always; names the first layer, else the parameter whose gradient is bad.
    """
    found = []
    for number, batch in passes:  # all of them: each is played by all processes together
        forward = partial(engine.forward, batch.images, batch.labels, step, number)
        if layer := first_bad_layer(engine.model, forward):
            found.append(layer)
    where = gather_object(found[:1]) + [f"gradient of {name}" for name in reversed(bad_gradients)] + ["gradient"]
    raise FloatingPointError(
        f"step {step + 1}: not finite or beyond range, first in {where[0]}; the checkpoint of the last good step "
        "stays. A lower optimizer.lr or a longer schedule.warmup_epochs is the usual remedy"
    )


@torch.no_grad()
def first_bad_layer(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Name what is not finite: a weight, else the first layer whose output is not while `forward` runs again."""
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            return f"weights {name}"
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: object, output: object) -> None:
        if not found and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
            found.append(f"output of layer {name}")

    layers = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    hooks = [module.register_forward_hook(partial(look, name)) for name, module in layers]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
