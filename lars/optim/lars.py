"""LARS: a rate of its own for every weight tensor (You, Gitman, Ginsburg, arXiv 1708.03888).

    ratio = trust_coefficient * |w| / (|g| + weight_decay * |w| + eps)       1 where |w| or |g| is 0
    paper:  v <- momentum * v + rate * ratio * (g + weight_decay * w);       w <- w - v
    torch:  v <- momentum * v + ratio * (g + weight_decay * w);              w <- w - rate * v

The modes differ whenever the rate changes: in the paper the velocity remembers the rates it was built with. MLPerf's
hyperparameters were tuned with `paper`, timm's LARS and torch.optim.SGD compute `torch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lars.optim.base import Optimizer, ShardingError
from lars.optim.key import NOT_NEGATIVE, POSITIVE, SHARE, key
from lars.optim.norms import tensor_norms, trust_ratios
from lars.optim.registry import Keys, register

MOMENTUM_MODES = ("paper", "torch")


@dataclass
class Work:
    """What this process updates of a group: tensors, or slices of layers where an engine keeps those."""

    group: dict[str, Any]
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)  # the first of `state_tensors`
    squares: list[Tensor] = field(default_factory=list)  # the second, for rules that have one
    layers: list[int] = field(default_factory=list)  # the number of each slice's layer; empty for whole tensors
    ratios: Tensor | None = None  # one for each tensor; None where the group is not adapted

    def add(self, *tensors: Tensor) -> None:
        for tensor, those in zip(tensors, (self.params, self.grads, self.velocities, self.squares)):
            those.append(tensor)

    def add_scaled(self, targets: list[Tensor], tensors: list[Tensor], rate: float, share: float = 1.0) -> None:
        """target <- target + share * rate * ratio * tensor, in place; ratios never leave the device."""
        if self.ratios is None:
            torch._foreach_add_(targets, tensors, alpha=rate * share)
        else:
            scales = [scale.to(t.dtype) for scale, t in zip((rate * self.ratios).unbind(), targets)]
            torch._foreach_addcmul_(targets, tensors, scales, value=share)


class LARS(Optimizer):
    """LARS for any model: `LARS(model.parameters(), lr=...)` alone is right.

    Tensors with at most one dimension (biases, norm scales and shifts) take plain momentum SGD without decay. A
    parameter group that names `adapt` or `weight_decay` itself has it for all its tensors; a group that mixes
    dimensions and leaves either open becomes two groups.

    Args:
        params: parameters or groups. `adapt=True` scales by the trust ratio, `adapt=False` is momentum SGD.
        lr: the global rate; LARS rates are large (32 at batch 32,768), because the trust ratio is small.
        trust_coefficient: the paper's eta.
        eps: added to the denominator of the ratio; MLPerf uses 0.
        momentum_mode: "paper" keeps the rate inside the velocity, "torch" outside.
        decay_in_norm: False leaves `weight_decay * |w|` out of the ratio, as the LARS authors' own Caffe fork does.

    Raises:
        ValueError: an argument is out of range.
        ShardingError: from `step()`, if an engine has put flat slices in place of the tensors.
    """

    state_tensors: tuple[str, ...] = ("momentum_buffer",)
    slices = "bound"

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        momentum_mode: str = "paper",
        decay_in_norm: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "momentum_mode": momentum_mode,
            "decay_in_norm": decay_in_norm,
            "adapt": None,
        }
        self._shapes: list[list[torch.Size]] = []  # of every group, as given: how flat slices are recognised
        self._applied: dict[Tensor, tuple[Tensor, int]] = {}  # by the model's parameter: its group's ratios, its place
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or a pickle, which has to be bound anew."""
        return {**super().__getstate__(), "_shapes": self._shapes, "_applied": {}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, split by dimension unless it says what to do with all its tensors."""
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        parts: dict[tuple[bool, float], list] = {}
        for entry in given:
            tensor = entry[1] if isinstance(entry, tuple) else entry  # (name, tensor) is allowed
            many = tensor.ndim > 1
            adapt = many if param_group.get("adapt") is None else bool(param_group["adapt"])
            decay = param_group.get("weight_decay", self.defaults["weight_decay"] if many else 0.0)
            parts.setdefault((adapt, decay), []).append(entry)
        for (adapt, decay), entries in parts.items() or [((True, 0.0), [])]:
            group = {**param_group, "params": entries, "adapt": adapt, "weight_decay": decay}
            super().add_param_group(group)
            _check(self.param_groups[-1])
            self._shapes.append([p.shape for p in self.param_groups[-1]["params"]])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; tensors without gradient are left alone. Rates are read from the groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.layout is None:
            self.refuse_slices()
        work = [self._work(group) for group in self.param_groups]
        self._set_ratios(work)
        for part in work:
            if part.ratios is not None:
                owners = part.params if self.layout is None else [self.layout.parameters[n] for n in part.layers]
                self._applied.update({p: (part.ratios, place) for place, p in enumerate(owners)})
            if part.params:
                self.update(part)
        return loss

    def update(self, work: Work) -> None:
        """The rule, in place, for the tensors or slices of one group."""
        update = _update_fused if _fused_kernel_fits(work) else _update_foreach
        update(work)

    def applied_ratios(self) -> dict[Tensor, float]:
        """{model's parameter: trust ratio of its last update}, of adapted layers of which this process has a part."""
        lists = {id(ratios): ratios.tolist() for ratios, _ in self._applied.values()}
        return {p: lists[id(ratios)][place] for p, (ratios, place) in self._applied.items()}

    def rule_of(self, group: dict[str, Any]) -> str:
        return "LARS" if group["adapt"] else "momentum SGD"

    def refuse_slices(self) -> None:
        """Raise ShardingError if a group's tensors are not the ones that were given."""
        shapes_now = [[p.shape for p in group["params"]] for group in self.param_groups]
        if shapes_now != self._shapes:
            raise ShardingError(
                "a parameter group holds other tensors than LARS was given: an engine has put its flat slices in their "
                "place, and norms of slices are not the layers' norms. Call lars.bind(model, optimizer) once after the "
                "engine is built"
            )

    def _work(self, group: dict[str, Any]) -> Work:
        params = [p for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in params):
            raise ValueError("LARS has no rule for sparse gradients")
        for p in params:
            if not self.state[p]:
                self.state[p].update({kind: torch.zeros_like(p) for kind in self.state_tensors})
        work = Work(group)
        for p in params:
            tensors = [p, p.grad, *(self.state[p][kind] for kind in self.state_tensors)]
            if self.layout is None:
                work.add(*tensors)
                continue
            for piece in self.layout.cut(p):
                work.add(*map(piece.of, tensors))
                work.layers.append(piece.layer)
        return work

    def _set_ratios(self, work: list[Work]) -> None:
        """Give the groups that are adapted their tensors' trust ratios; at most one all-reduce in all."""
        adapted = [part for part in work if part.group["adapt"] and part.params]
        norms = [tensor_norms(part.params, part.grads) for part in adapted]
        sliced = [group for group in self.param_groups if group["adapt"] and group["params"]]  # the same on all ranks
        if self.layout is not None and sliced:
            norms = self.layout.norms([part.layers for part in adapted], norms, sliced[0]["params"][0].device)
        for part, some in zip(adapted, norms):
            part.ratios = trust_ratios(some[0], some[1], part.group)


def _fused_kernel_fits(work: Work) -> bool:
    """torch's kernel walks memory without looking at strides, and has no velocity at momentum 0."""
    return work.group["momentum"] > 0 and all(
        p.device.type == "cpu" and p.dtype == g.dtype == torch.float32 and p.stride() == g.stride()
        for p, g in zip(work.params, work.grads)
    )


def rates(group: dict[str, Any]) -> tuple[float, float]:
    """What the step is multiplied by on its way into the velocity, and what the velocity on its way out."""
    return (group["lr"], 1.0) if group["momentum_mode"] == "paper" else (1.0, group["lr"])


def _update_fused(work: Work) -> None:
    """One memory pass over w, g and v, with torch's fused SGD kernel.

    It computes v <- momentum v + (1 - dampening)(g + decay w); w <- w - lr v, so `dampening` carries the ratio, and
    the rate too where it belongs inside the velocity.
    """
    inside, outside = rates(work.group)
    if work.ratios is None:
        batches = [(work.params, work.grads, work.velocities, 1.0)]
    else:
        each = zip(work.params, work.grads, work.velocities, work.ratios.tolist())
        batches = [([p], [g], [v], ratio) for p, g, v, ratio in each]
    for params, grads, velocities, ratio in batches:
        torch._fused_sgd_(
            params,
            grads,
            velocities,
            weight_decay=work.group["weight_decay"],
            momentum=work.group["momentum"],
            lr=outside,
            dampening=1.0 - inside * ratio,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )


def _update_foreach(work: Work) -> None:
    """The rule in place with torch's list operations: any device and dtype."""
    (inside, outside), decay = rates(work.group), work.group["weight_decay"]
    torch._foreach_mul_(work.velocities, work.group["momentum"])
    work.add_scaled(work.velocities, work.grads, inside)
    if decay:
        work.add_scaled(work.velocities, work.params, inside, decay)
    torch._foreach_sub_(work.params, work.velocities, alpha=outside)


def _check(group: dict[str, Any]) -> None:
    for name in ("lr", "momentum", "weight_decay", "trust_coefficient", "eps"):
        value, limit = float(group[name]), 1.0 if name == "momentum" else float("inf")
        if not 0.0 <= value < limit:
            raise ValueError(f"{name} must lie in [0, {limit:g}), not {value:g}")
    if group["trust_coefficient"] == 0:
        raise ValueError("trust_coefficient must be positive: with 0 no adapted tensor would ever move")
    if group["momentum_mode"] not in MOMENTUM_MODES:
        raise ValueError(f"momentum_mode must be one of {', '.join(MOMENTUM_MODES)}, not {group['momentum_mode']!r}")


@dataclass
class MomentumKeys(Keys):
    momentum: float = key("the share of the velocity that is kept", limit=SHARE)
    momentum_mode: str = key("paper: the rate inside the velocity; torch: outside", choices=MOMENTUM_MODES)


@dataclass
class RatioKeys:
    trust_coefficient: float = key("the paper's eta", limit=POSITIVE)
    eps: float = key("added to the denominator of the trust ratio", 0.0, limit=NOT_NEGATIVE)
    decay_in_norm: bool = key("false: the ratio without weight decay, as nvcaffe has it", True)
    adapt_1d: bool = key("true: biases and norm scales are adapted and decayed too", False)


@dataclass
class LARSKeys(RatioKeys, MomentumKeys):
    pass


@register("lars", LARSKeys)
def build(keys: LARSKeys, trained: list[torch.nn.Parameter], kind: type[LARS] = LARS) -> LARS:
    every = [{"params": trained, "adapt": True, "weight_decay": keys.weight_decay}]
    rule = {name: value for name, value in asdict(keys).items() if name not in ("name", "adapt_1d")}
    return kind(every if keys.adapt_1d else trained, **rule)
