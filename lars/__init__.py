"""LARS that is the same on every engine, and the parts of a training run that no cluster can change.

`LARS`, `ShardingError` and `bind` need torch alone. It is imported when one of them is first used, so that a run can
pin its instruction set first (`lars.exact.portable`). `register_with_timm` adds `exact_lars` to timm's factory.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["LARS", "ShardingError", "bind", "register_with_timm"]
_MODULES = {"LARS": "lars.optim.lars", "ShardingError": "lars.optim.base", "bind": "lars.optim.sharding"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lars' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def register_with_timm() -> None:
    """Let `timm.optim.create_optimizer_v2(model, "exact_lars", ...)` build LARS; timm's own is `lars`."""
    from timm.optim._optim_factory import OptimInfo, default_registry

    from lars.optim.lars import LARS

    if "exactlars" in default_registry.list_optimizers():
        return
    for name in ("exact_lars", "exactlars"):
        default_registry.register(OptimInfo(name, LARS, "LARS as in arXiv 1708.03888", has_eps=True, has_momentum=True))
    build = default_registry.create_optimizer

    def create_optimizer(model_or_params: Any, opt: str, *args: Any, **kwargs: Any) -> Any:
        # timm looks up only what follows the last underscore: "exact_lars" would silently be its own "lars".
        return build(model_or_params, opt.lower().replace("exact_lars", "exactlars"), *args, **kwargs)

    default_registry.create_optimizer = create_optimizer
