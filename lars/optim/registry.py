"""The optimizers that a recipe may name: one file each, here or in a recipe's own `model.py`.

An optimizer brings its keys (a dataclass from `Keys`), names the tensors of its state, and says what an engine's slices
mean for it. Nothing else in the library knows an optimizer by name.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lars.optim.key import NOT_NEGATIVE, POSITIVE, key

if TYPE_CHECKING:  # keys are read before a run pins its instruction set, and so before torch is imported
    import torch


@dataclass
class Keys:
    """What every optimizer has; an optimizer's own keys follow in its own dataclass."""

    name: str = key("which rule updates the weights")
    lr: float = key("the rate after warm-up", limit=POSITIVE)
    weight_decay: float = key("of tensors with more than one dimension", limit=NOT_NEGATIVE)


@dataclass(frozen=True)
class Entry:
    """An optimizer that a recipe may name.

    `build` takes the recipe's keys and the parameters that are trained; it makes a `lars.optim.base.Optimizer`.
    """

    keys: type[Keys]
    build: Callable[[Any, list[torch.nn.Parameter]], torch.optim.Optimizer]


_entries: dict[str, Entry] = {}


def register(name: str, keys: type[Keys]) -> Callable:
    """Decorator of a `build` function: recipes may say `optimizer.name: NAME` from now on."""

    def add(build: Callable[[Any, list[torch.nn.Parameter]], torch.optim.Optimizer]) -> Callable:
        _entries[name] = Entry(keys, build)
        return build

    return add


def optimizers() -> dict[str, Entry]:
    """All that are known, after each file of this folder has been imported."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        import_module(f"lars.optim.{module.name}")
    return _entries
