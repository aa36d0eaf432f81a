"""What a process of a run needs in memory, told before the first step."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lars.batch import BatchPlan
from lars.config import Recipe, one_line

# Per trained element of plain data parallel: weight, velocity, gradient of one pass (float32), the order-free sum (int64)
# and its mean (float32). DDP has one gradient, and no sum.
PLAIN_BYTES, DDP_BYTES = 4 + 4 + 4 + 8 + 4, 4 + 4 + 4


def activation_bytes(model: nn.Module, images: tuple[int, int, int, int]) -> int:
    """What one forward of images (n, 3, height, width) in float32 keeps for its backward.

    Counted on tensors without storage; nothing is computed. Random layers draw nothing.
    """
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shadow = {name: torch.empty_like(t, device="meta").requires_grad_(t.requires_grad) for name, t in named.items()}
    weights = {t.untyped_storage()._cdata for t in shadow.values()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        logits = functional_call(model, shadow, (torch.empty(images, device="meta"),))
    del logits  # until here it holds all storages, so no number is used twice
    return sum(size for storage, size in kept.items() if storage not in weights)


def memory_line(model: nn.Module, recipe: Recipe, plan: BatchPlan, engine: str) -> str:
    """State and activations of a process, in MiB; `model` is a plain one on the CPU that is not used for anything else."""
    elements, size = sum(p.numel() for p in model.parameters() if p.requires_grad), recipe.model.image_size
    if recipe.runtime.activation_checkpointing and hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    try:
        activations = activation_bytes(model, (plan.micro_batch, 3, size, size)) / 2**20 / (2 if recipe.precision == "bf16" else 1)
        one_pass = f"{activations:,.0f} MiB of activations (one pass, however many there are)"
    except (RuntimeError, TypeError, ValueError) as error:  # a model that looks at its numbers
        one_pass = f"the activations of one pass, which could not be counted ({one_line(error)})"
    each = PLAIN_BYTES if recipe.runtime.deterministic or plan.processes == 1 else DDP_BYTES
    state = f"{each * elements / 2**20:,.0f} MiB of state ({each} bytes x {elements:,} weights)"
    state = state if engine == "plain" else f"{engine}'s share of the state of {elements:,} weights"
    return f"memory a process: {state} + {one_pass}"
