"""LARS that is the same on every engine, and the parts of a training run that no cluster can change.

`import lars` needs torch alone. Where timm is installed, the optimizer is registered there as `exact_lars`.
"""
from lars.optimizer import LARS, ShardingError

__all__ = ["LARS", "ShardingError"]

try:
    from timm.optim._optim_factory import OptimInfo, default_registry
except ImportError:
    pass
else:
    default_registry.register(
        OptimInfo(
            name="exact_lars",
            opt_class=LARS,
            description="LARS as in arXiv 1708.03888, exact under sharded engines",
            has_eps=True,
            has_momentum=True,
        )
    )
