"""One process, or data parallel with the order-free sum: the same weights for every number of processes."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from lars.engine.base import Engine
from lars.optim.base import Optimizer
from lars.recipe.batch import BatchPlan

log = logging.getLogger("lars")


class Plain(Engine):
    """Each process holds the whole model; the order-free sum adds the gradients of all passes."""

    exchanges_gradients = False
    weights_may_be_channels_last = True
    memory_was_short = False

    @property
    def reproducibility(self) -> str:
        return "bitwise" if self.recipe.runtime.deterministic else "numeric"

    def wrap(self, optimizer: Optimizer, plan: BatchPlan) -> None:
        self.optimizer = optimizer
        self.train_module = torch.compile(self.model) if self.recipe.runtime.compile else self.model

    def backward(self, loss: Tensor, passes: int) -> None:
        """The order-free sum divides by the number of passes itself."""
        loss.backward()

    def update(self) -> bool:
        self._look_at_memory()
        return super().update()

    def _look_at_memory(self) -> None:
        """Warn once: where cuDNN gets no workspace it takes another algorithm, which has other bits, without a word."""
        if self.device.type != "cuda" or self.reproducibility != "bitwise" or self.memory_was_short:
            return
        if retries := torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0):
            self.memory_was_short = True
            log.warning(
                "rank %d: the GPU's memory ran short %d times (num_alloc_retries), so cuDNN may have taken other "
                "algorithms and the weights may have other bits: lower runtime.micro_batch",
                self.rank,
                retries,
            )
