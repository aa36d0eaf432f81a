"""One process, or data parallel with the order-free sum: the same weights for every number of processes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lars.engine.base import Engine
from lars.optim.base import Optimizer
from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe
from lars.recipe.launched import Launched


class Plain(Engine):
    """Each process holds the whole model; the order-free sum adds the gradients of all passes."""

    exchanges_gradients = False
    weights_may_be_channels_last = True

    def __init__(self, recipe: Recipe, launched: Launched) -> None:
        super().__init__(recipe, launched)
        self.reproducibility = "bitwise" if recipe.runtime.deterministic else "numeric"

    def wrap(self, optimizer: Optimizer, plan: BatchPlan) -> None:
        self.optimizer = optimizer
        self.train_module = torch.compile(self.model) if self.recipe.runtime.compile else self.model

    def exchange(self, last: bool) -> AbstractContextManager:
        return nullcontext()

    def backward(self, loss: Tensor, passes: int) -> None:
        """The order-free sum divides by the number of passes itself."""
        loss.backward()

    def bad_gradients(self) -> list[str]:
        """None: the order-free sum finds its own."""
        return []
