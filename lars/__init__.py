"""LARS that is the same on every engine, and the parts of a training run that no cluster can change.

`import lars` needs torch alone. Where timm is installed, the optimizer is registered there as `exact_lars`.
"""
from lars.optimizer import LARS, ShardingError
from lars.sharding import bind

__all__ = ["LARS", "ShardingError", "bind"]


def _register_with_timm() -> None:
    try:
        from timm.optim._optim_factory import OptimInfo, default_registry
    except ImportError:
        return
    for name in ("exact_lars", "exactlars"):
        default_registry.register(OptimInfo(name, LARS, "LARS as in arXiv 1708.03888", has_eps=True, has_momentum=True))
    build = default_registry.create_optimizer

    def create_optimizer(model_or_params, opt, *args, **kwargs):
        # timm looks up only what follows the last underscore: "exact_lars" would silently be its own "lars".
        return build(model_or_params, opt.lower().replace("exact_lars", "exactlars"), *args, **kwargs)

    default_registry.create_optimizer = create_optimizer


_register_with_timm()
