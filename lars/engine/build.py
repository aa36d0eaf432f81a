"""Builds model, optimizer and the engine that the launch file asks for; each engine asserts that it is what it says."""

from __future__ import annotations

from importlib import import_module

import timm
import torch
from torch import nn

from lars.engine.base import Engine
from lars.exact.ghost_batchnorm import GhostBatchNorm2d, convert
from lars.optim.base import Optimizer
from lars.optim.registry import optimizers
from lars.recipe import pretrained
from lars.recipe.keys import Recipe
from lars.recipe.launched import Launched
from lars.recipe.refusal import RecipeError, did_you_mean, one_line

ENGINES = {  # module and class; imported when a run asks for it, since DeepSpeed takes seconds and may not be installed
    "plain": ("plain", "Plain"),
    "ddp": ("ddp", "DDP"),
    **{f"zero{stage}": ("deepspeed", "DeepSpeed") for stage in range(4)},
    "fsdp2": ("fsdp2", "FSDP2"),
}


def build_model(recipe: Recipe) -> tuple[nn.Module, list[GhostBatchNorm2d]]:
    """The timm model with its first weights, drawn on the CPU from the seed, and its batch norms cut into groups.

    Raises:
        RecipeError: timm does not know the model, or `model.kwargs` or `bn_group` do not fit it.
    """
    name = recipe.model.name
    if not timm.is_model(name):
        raise RecipeError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    kwargs = pretrained.without_lost_weights(recipe.model.kwargs)
    torch.manual_seed(recipe.seed)
    try:
        model = timm.create_model(name, num_classes=recipe.model.num_classes, **kwargs)
    except Exception as error:  # whatever a model makes of arguments that it does not know or cannot use
        raise RecipeError(f"model.name={name} cannot be built with model.kwargs={kwargs}: {one_line(error)}") from None
    for beginning in recipe.model.frozen:
        if not (named := [p for n, p in model.named_parameters() if n.startswith(beginning)]):
            first = next(iter(model.state_dict()), "nothing")
            raise RecipeError(f"model.frozen: no parameter of {name} begins with {beginning!r}; the first is {first}")
        for p in named:
            p.requires_grad_(False)
    try:
        return model, convert(model, recipe.bn_group)
    except ValueError as error:
        raise RecipeError(str(error)) from None


def build_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """The optimizer that the recipe names, of the parameters that are trained.

    Raises:
        RecipeError: there is nothing to train, or the optimizer does not say what its state is.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise RecipeError("the model has no parameter to train")
    name = recipe.optimizer.name
    optimizer = optimizers()[name].build(recipe.optimizer, trained)
    if not isinstance(optimizer, Optimizer) or not optimizer.state_tensors:
        raise RecipeError(f"optimizer.name={name} is no lars.optim.base.Optimizer that names its state_tensors")
    return optimizer


def sums_order_free(recipe: Recipe, processes: int) -> bool:
    """Whether plain data parallel adds gradients with the order-free sum, or with DDP, which promises no bits."""
    return recipe.runtime.deterministic or processes == 1


def start_engine(recipe: Recipe, launched: Launched) -> Engine:
    """Start the processes that the launcher asked for, with the engine that the launch file names."""
    name = launched.engine
    if name == "plain" and not sums_order_free(recipe, launched.processes):
        name = "ddp"
    module, kind = ENGINES[name]
    engine = getattr(import_module(f"lars.engine.{module}"), kind)(recipe, launched)
    engine.name = name
    return engine
