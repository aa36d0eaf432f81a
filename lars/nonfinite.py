"""Where a loss or a gradient first stopped being a number."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


@torch.no_grad()
def first_bad_layer(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Name what is not finite: a weight, else the first layer whose output is not while `forward` runs again."""
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            return f"weights {name}"
    found: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        if not any(module.children()):

            def look(module: nn.Module, inputs: object, output: object, name: str = name) -> None:
                if not found and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                    found.append(f"output of layer {name}")

            hooks.append(module.register_forward_hook(look))
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
