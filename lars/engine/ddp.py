"""DDP: the faster sum of `runtime.deterministic=false`, whose rounding depends on the number of processes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from lars.engine.base import Engine
from lars.optim.base import Optimizer
from lars.recipe.batch import BatchPlan


class DDP(Engine):
    """DDP exchanges gradients in floating point while the last pass's backward runs."""

    weights_may_be_channels_last = True

    def wrap(self, optimizer: Optimizer, plan: BatchPlan) -> None:
        self.optimizer = optimizer
        compiled = torch.compile(self.model) if self.recipe.runtime.compile else self.model
        self.train_module = self.accelerator.prepare_model(compiled)
        assert isinstance(self.train_module, nn.parallel.DistributedDataParallel), type(self.train_module)

    def exchange(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.train_module.no_sync()
