"""Builds model, optimizer and the engine that the launch file asks for.

`engine_plain.py` is the plain engine and DDP, `engine_deepspeed.py` and `engine_fsdp2.py` change of it what those do in
their own way. Each asserts that it is what it says.
"""
from __future__ import annotations

import timm
import torch
from torch import nn

from lars import pretrained
from lars.config import Recipe, RecipeError, did_you_mean, one_line
from lars.engine_plain import Engine
from lars.ghost_batchnorm import GhostBatchNorm2d, convert
from lars.launched import Launched
from lars.optimizer import LARS


def build_model(recipe: Recipe) -> tuple[nn.Module, list[GhostBatchNorm2d]]:
    """The timm model with its first weights, drawn on the CPU from the seed, and its batch norms cut into groups.

    Raises:
        RecipeError: timm does not know the model, or the model does not take `model.kwargs`.
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
    return model, convert(model, recipe.bn_group)


def build_optimizer(recipe: Recipe, model: nn.Module) -> LARS:
    """LARS, or momentum SGD as LARS with no tensor adapted, so that both have the same groups and momentum modes."""
    keys = recipe.optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise RecipeError("the model has no parameter to train")
    common = {"lr": keys.lr, "momentum": keys.momentum, "weight_decay": keys.weight_decay, "momentum_mode": keys.momentum_mode}
    if keys.name == "lars":
        ratio = {"trust_coefficient": keys.trust_coefficient, "eps": keys.eps, "decay_in_norm": keys.decay_in_norm}
        every = [{"params": trained, "adapt": True, "weight_decay": keys.weight_decay}]
        return LARS(every if keys.adapt_1d else trained, **ratio, **common)
    return LARS([{"params": trained, "adapt": False}], **common)


def start_engine(recipe: Recipe, launched: Launched) -> Engine:
    """Start the processes that the launcher asked for, with the engine that the launch file names."""
    if launched.deepspeed:
        from lars.engine_deepspeed import DeepSpeed

        return DeepSpeed(recipe, launched)
    if launched.engine == "fsdp2":
        from lars.engine_fsdp2 import FSDP2

        return FSDP2(recipe, launched)
    return Engine(recipe, launched)
