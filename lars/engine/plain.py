"""One process, or data parallel with the order-free sum: the same weights for every number of processes."""

from __future__ import annotations

import torch
from torch import Tensor

from lars.engine.base import Engine
from lars.optim.base import Optimizer
from lars.recipe.batch import BatchPlan


class Plain(Engine):
    """Each process holds the whole model; the order-free sum adds the gradients of all passes."""

    exchanges_gradients = False
    weights_may_be_channels_last = True

    @property
    def reproducibility(self) -> str:
        return "bitwise" if self.recipe.runtime.deterministic else "numeric"

    def wrap(self, optimizer: Optimizer, plan: BatchPlan) -> None:
        self.optimizer = optimizer
        self.train_module = torch.compile(self.model) if self.recipe.runtime.compile else self.model

    def backward(self, loss: Tensor, passes: int) -> None:
        """The order-free sum divides by the number of passes itself."""
        loss.backward()
