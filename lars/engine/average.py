"""The exponential moving average of a model's weights and running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_MARK = "/ema"  # after a tensor's name in a checkpoint


class Average:
    """average <- decay * average + (1 - decay) * weights, after every update; it begins with the first weights.

    As timm's ModelEmaV3 without its warm-up: running statistics are averaged like weights, and counters are copied. All
    processes hold whole weights that are equal, so each averages its own.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.averages = {name: tensor.clone() for name, tensor in tensors_of(model).items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, tensor in tensors_of(self.model).items():
            if tensor.is_floating_point():
                self.averages[name].lerp_(tensor, 1.0 - self.decay)
            else:
                self.averages[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in tensors_of(self.model).items():
            weights = tensor.clone()
            tensor.copy_(self.averages[name])
            self.averages[name].copy_(weights)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of a state dict, one that has two names under the first; an engine may move them."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor.detach()))
    return dict(found.values())


def named_in_checkpoint(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Averages by the names that they have beside a checkpoint's momentum."""
    return {name + _MARK: tensor for name, tensor in tensors.items()}


def parted(saved: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a checkpoint keeps beside the weights: momentum, and the averages by the model's own names."""
    averages = {name.removesuffix(_MARK): tensor for name, tensor in saved.items() if name.endswith(_MARK)}
    return {name: tensor for name, tensor in saved.items() if not name.endswith(_MARK)}, averages
