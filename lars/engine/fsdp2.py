"""FSDP2: weights, gradients and momentum as DTensors, cut by torch's `fully_shard`."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lars.engine.base import Engine
from lars.exact.ghost_batchnorm import GhostBatchNorm2d
from lars.optim import norms
from lars.optim.base import Optimizer
from lars.recipe.batch import BatchPlan


class FSDP2(Engine):
    """`fully_shard` on every device: accelerate's own FSDP needs a GPU, and is silently something else without one."""

    def prepare(self, model: nn.Module, ghosts: list[GhostBatchNorm2d]) -> None:
        """Shard the model's direct children one by one and then the rest; parameters are DTensors afterwards."""
        super().prepare(model, ghosts)
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
        parameters = [p for _, p in model.named_parameters(remove_duplicate=False)]
        if len(parameters) == len(set(parameters)):  # a weight that two children share has to stay in one unit
            for child in model.children():
                if any(True for _ in child.parameters()):
                    fully_shard(child, reshard_after_forward=reshard)
        fully_shard(model, reshard_after_forward=reshard)
        assert isinstance(model, FSDPModule) and all(isinstance(p, DTensor) for p in model.parameters())

    def wrap(self, optimizer: Optimizer, plan: BatchPlan) -> None:
        self.optimizer = optimizer
        assert all(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])

    def exchange(self, last: bool) -> AbstractContextManager:
        """Gradients are reduced and cut in the last pass's backward only."""
        self.model.set_requires_gradient_sync(last)
        return super().exchange(last)

    def bad_gradients(self) -> list[str]:
        """Names of the parameters whose gradient is not finite on some process."""
        named = [(n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
        finite = torch.stack([g.to_local().isfinite().all() for _, g in named]).to(torch.int32)
        finite = self.accelerator.reduce(finite, reduction="sum").tolist()
        return [name for (name, _), processes in zip(named, finite) if processes < self.accelerator.num_processes]

    def clip(self, grads: list[Tensor], limit: float) -> None:
        group = self.optimizer.layout.group
        norms.clip([g.to_local() for g in grads], limit, lambda square: dist.all_reduce(square, group=group))

    def weights(self) -> dict[str, Tensor]:
        return {name: _whole(tensor) for name, tensor in super().weights().items()}

    def momentum(self) -> dict[str, Tensor]:
        return {name: _whole(tensor) for name, tensor in super().momentum().items()}

    def like(self, parameter: Tensor, whole: Tensor) -> Tensor:
        return distribute_tensor(whole.to(self.device), parameter.device_mesh, parameter.placements)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
