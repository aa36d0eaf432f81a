"""What a process of a run needs in memory, told before the first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lars.engine.build import sums_order_free
from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe
from lars.recipe.refusal import RecipeError, one_line
from lars.recipe.schedule import training_sizes


def state_bytes(recipe: Recipe, processes: int) -> int:
    """Bytes for each trained element of plain data parallel.

    Weight, velocity, gradient of one pass (float32), the order-free sum (int64) and its mean (float32). DDP has one
    gradient, and no sum. An average of the weights comes on top.
    """
    return (4 + 4 + 4 + 8 + 4 if sums_order_free(recipe, processes) else 4 + 4 + 4) + 4 * bool(recipe.ema_decay)


def kept_in(precision: str, float32_bytes: float) -> float:
    """What a forward in this precision keeps where one in float32 keeps so much: tf32 the same, bf16 half."""
    return float32_bytes / 2 if precision == "bf16" else float32_bytes


def activation_bytes(model: nn.Module, images: tuple[int, int, int, int], classes: int | None = None) -> int:
    """What one forward of images (n, 3, height, width) in float32 keeps for its backward.

    Counted on tensors without storage; nothing is computed. Random layers draw nothing.

    Raises:
        ValueError: the logits are not (n, classes), where that is given. A model raises what it likes.
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
    _check_logits(logits, images[0], classes)
    del logits  # until here it holds all storages, so no number is used twice
    return sum(size for storage, size in kept.items() if storage not in weights)


def memory_of(model: nn.Module, recipe: Recipe, plan: BatchPlan, engine: str) -> tuple[str, float]:
    """What a process needs: a line with state and activations in MiB, and bytes, 0 where they are not known.

    Args:
        model: a plain one on the CPU that is not used for anything else.

    Raises:
        RecipeError: the model cannot be trained on the recipe's images.
    """
    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    activations, needed = 0.0, 0.0
    try:
        if recipe.runtime.activation_checkpointing and hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing()
        counted = {
            size: activation_bytes(model, (plan.micro_batch, 3, size, size), recipe.model.num_classes)
            for size in {*training_sizes(recipe), recipe.model.image_size}
        }
        activations = kept_in(recipe.precision, max(counted[size] for size in training_sizes(recipe)))
        one_pass = f"{activations / 2**20:,.0f} MiB of activations (one pass, however many there are)"
    except Exception as error:  # a model that looks at its numbers, or one that cannot take these images
        _play(model, recipe)
        one_pass = f"the activations of one pass, which could not be counted ({one_line(error)})"
    state = f"{engine}'s share of the state of {elements:,} weights"
    if engine == "plain":
        each = state_bytes(recipe, plan.processes)
        state = f"{each * elements / 2**20:,.0f} MiB of state ({each} bytes x {elements:,} weights)"
        needed = each * elements + activations if activations else 0.0
    return f"memory a process: {state} + {one_pass}", needed


def _play(model: nn.Module, recipe: Recipe) -> None:
    """Forwards that really compute, of as few images as the model takes."""
    images = recipe.bn_group or 2
    for size in (recipe.model.image_size, *recipe.augment.sizes):
        try:
            with torch.no_grad():
                _check_logits(model(torch.empty(images, 3, size, size)), images, recipe.model.num_classes)
        except Exception as error:  # each model has its own
            key = "model.image_size" if size == recipe.model.image_size else "augment.sizes"
            what = f"model.name={recipe.model.name} cannot be trained on images of {key}={size}"
            raise RecipeError(f"{what}: {one_line(error)}") from None


def _check_logits(logits: Any, images: int, classes: int | None) -> None:
    shape = tuple(getattr(logits, "shape", ()))
    if classes is not None and shape != (images, classes):
        raise ValueError(f"its output has the shape {shape}, not {(images, classes)} (images, model.num_classes)")
