"""LARS: a rate of its own for every weight tensor (You, Gitman, Ginsburg, arXiv 1708.03888).

    ratio = trust_coefficient * |w| / (|g| + weight_decay * |w| + eps)       1 where |w| or |g| is 0
    paper:  v <- momentum * v + rate * ratio * (g + weight_decay * w);       w <- w - v
    torch:  v <- momentum * v + ratio * (g + weight_decay * w);              w <- w - rate * v

The modes differ whenever the rate changes: in the paper the velocity remembers the rates it was built with. MLPerf's
hyperparameters were tuned with `paper`, timm's LARS and torch.optim.SGD compute `torch`.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM_MODES = ("paper", "torch")


class ShardingError(RuntimeError):
    """The optimizer would see slices of weights where LARS needs the norms of whole ones."""


class LARS(torch.optim.Optimizer):
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
        self.layout = None  # lars.sharding.Layout, set by lars.bind where an engine keeps slices
        self._shapes: list[list[torch.Size]] = []  # of every group, as given: how flat slices are recognised
        self._applied: dict[Tensor, tuple[Tensor, int]] = {}  # by the model's parameter: its group's ratios, its place there
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_shapes": self._shapes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle: it has to be bound anew."""
        self.__dict__.setdefault("layout", None)
        self.__dict__.setdefault("_applied", {})
        super().__setstate__(state)

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
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; tensors without gradient are left alone. Rates are read from the groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.layout is None:
            self.refuse_slices()
        work = [(group, *self._tensors(group)) for group in self.param_groups]
        ratios = self._ratios(work)
        for (group, params, grads, velocities, layers), some_ratios in zip(work, ratios):
            if some_ratios is not None:
                owners = params if self.layout is None else [self.layout.parameters[layer] for layer in layers]
                self._applied.update({p: (some_ratios, place) for place, p in enumerate(owners)})
            if params:
                update = _update_fused if _fused_kernel_fits(params, grads, group) else _update_foreach
                update(params, grads, velocities, some_ratios, group)
        return loss

    def applied_ratios(self) -> dict[Tensor, float]:
        """{model's parameter: the trust ratio of its last update}, of the adapted layers that this process holds a part of."""
        lists = {id(ratios): ratios.tolist() for ratios, _ in self._applied.values()}
        return {p: lists[id(ratios)][place] for p, (ratios, place) in self._applied.items()}

    def refuse_slices(self) -> None:
        """Raise ShardingError if a group's tensors are not the ones that were given."""
        shapes_now = [[p.shape for p in group["params"]] for group in self.param_groups]
        if shapes_now != self._shapes:
            raise ShardingError(
                "a parameter group holds other tensors than LARS was given: an engine has put its flat slices in their "
                "place, and norms of slices are not the layers' norms. Call lars.bind(model, optimizer) once after the "
                "engine is built"
            )

    def _tensors(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
        """Weights, gradients and velocities that this process updates, and the number of the layer each belongs to."""
        params = [p for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in params):
            raise ValueError("LARS has no rule for sparse gradients")
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        velocities = [self.state[p]["momentum_buffer"] for p in params]
        if self.layout is None:
            return params, [p.grad for p in params], velocities, []
        cut = [(layer, view(p), view(p.grad), view(v)) for p, v in zip(params, velocities) for layer, view in self.layout.cut(p)]
        layers, weights, grads, velocities = map(list, zip(*cut)) if cut else ([], [], [], [])
        return weights, grads, velocities, layers

    def _ratios(self, work: list[tuple]) -> list[Tensor | None]:
        """For each group its tensors' trust ratios, None where it does not adapt; at most one all-reduce in all."""
        norms = [_norms(params, grads) if group["adapt"] and params else None for group, params, grads, _, _ in work]
        sliced = [group for group in self.param_groups if group["adapt"] and group["params"]]  # the same on all ranks
        if self.layout is not None and sliced:
            device = sliced[0]["params"][0].device
            squares = torch.zeros(2, self.layout.layers, device=device)
            for (*_, layers), some in zip(work, norms):
                if some is not None:
                    squares.index_add_(1, self.layout.index(layers, device), some.square())
            whole = _roots(self.layout.squared_norms(squares))
            norms = [
                None if some is None else whole.index_select(1, self.layout.index(layers, device))
                for (*_, layers), some in zip(work, norms)
            ]
        return [None if some is None else trust_ratios(*some, group) for (group, *_), some in zip(work, norms)]


_ROW = 1 << 12  # elements that a CPU adds up in float32 in one go


def _norms(params: list[Tensor], grads: list[Tensor]) -> Tensor:
    """(2, n): the norms of n weights and of their gradients, float32."""
    if params[0].device.type == "cpu" and all(t.dtype == torch.float32 for t in (*params, *grads)):
        norms = [[math.sqrt(_square(t)) for t in tensors] for tensors in (params, grads)]
        return torch.tensor(norms, dtype=torch.float32, device="cpu")
    return torch.stack([torch.stack(torch._foreach_norm(tensors)).float() for tensors in (params, grads)])


def _square(tensor: Tensor) -> float:
    """A squared norm on a CPU, from rows whose norms are combined in float64: the same with any number of threads.

    torch's own norm of a whole tensor is 0.2 % off at 38 million elements, and `torch.dot` 2e-6 at half a million.
    """
    flat = tensor if tensor.is_contiguous() or tensor.ndim != 4 else tensor.permute(0, 2, 3, 1)
    flat = flat.reshape(-1)
    whole = len(flat) // _ROW * _ROW
    square = float(torch.linalg.vector_norm(flat[whole:])) ** 2 if whole < len(flat) else 0.0
    if whole:
        rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1).double()
        square += float(torch.dot(rows, rows))
    return square


def _roots(squares: Tensor) -> Tensor:
    """Rounded correctly on a CPU, where the last bit of torch's own (of MKL's VML) depends on the processor's kind."""
    if squares.device.type != "cpu":
        return squares.sqrt()
    return torch.tensor([[math.sqrt(x) for x in row] for row in squares.tolist()], dtype=squares.dtype, device="cpu")


def trust_ratios(weight_norms: Tensor, grad_norms: Tensor, group: dict[str, Any]) -> Tensor:
    """eta |w| / (|g| + beta |w| + eps) for each tensor, without beta |w| unless `decay_in_norm`; 1 where |w| or |g| is 0."""
    decay = group["weight_decay"] if group["decay_in_norm"] else 0.0
    ratios = group["trust_coefficient"] * weight_norms / (grad_norms + decay * weight_norms + group["eps"])
    return torch.where((weight_norms > 0) & (grad_norms > 0), ratios, 1.0)


def _fused_kernel_fits(params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> bool:
    """torch's kernel walks memory without looking at strides, and has no velocity at momentum 0."""
    return group["momentum"] > 0 and all(
        p.device.type == "cpu" and p.dtype == g.dtype == torch.float32 and p.stride() == g.stride()
        for p, g in zip(params, grads)
    )


def _update_fused(
    params: list[Tensor], grads: list[Tensor], velocities: list[Tensor], ratios: Tensor | None, group: dict[str, Any]
) -> None:
    """One memory pass over w, g and v, with torch's fused SGD kernel.

    It computes v <- momentum v + (1 - dampening)(g + decay w); w <- w - lr v, so `dampening` carries the ratio, and
    the rate too where it belongs inside the velocity.
    """
    inside = group["lr"] if group["momentum_mode"] == "paper" else 1.0
    outside = 1.0 if group["momentum_mode"] == "paper" else group["lr"]
    if ratios is None:
        batches = [(params, grads, velocities, 1.0)]
    else:
        batches = [([p], [g], [v], r) for p, g, v, r in zip(params, grads, velocities, ratios.tolist())]
    for some_params, some_grads, some_velocities, ratio in batches:
        torch._fused_sgd_(
            some_params,
            some_grads,
            some_velocities,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=outside,
            dampening=1.0 - inside * ratio,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )


def _update_foreach(
    params: list[Tensor], grads: list[Tensor], velocities: list[Tensor], ratios: Tensor | None, group: dict[str, Any]
) -> None:
    """The rule in place with torch's list operations: any device and dtype, no temporaries; ratios never leave the device."""
    paper, decay = group["momentum_mode"] == "paper", group["weight_decay"]
    inside, outside = (group["lr"], 1.0) if paper else (1.0, group["lr"])
    torch._foreach_mul_(velocities, group["momentum"])
    if ratios is None:
        torch._foreach_add_(velocities, grads, alpha=inside)
        if decay:
            torch._foreach_add_(velocities, params, alpha=inside * decay)
    else:
        scales = [r.to(v.dtype) for r, v in zip((inside * ratios).unbind(), velocities)]
        torch._foreach_addcmul_(velocities, grads, scales)
        if decay:
            torch._foreach_addcmul_(velocities, params, scales, value=decay)
    torch._foreach_sub_(params, velocities, alpha=outside)


def _check(group: dict[str, Any]) -> None:
    for key, low, high in (
        ("lr", 0.0, float("inf")),
        ("momentum", 0.0, 1.0),
        ("weight_decay", 0.0, float("inf")),
        ("trust_coefficient", 0.0, float("inf")),
        ("eps", 0.0, float("inf")),
    ):
        value = float(group[key])
        if not low <= value < high:
            raise ValueError(f"{key} must lie in [{low:g}, {high:g}), not {value:g}")
    if group["trust_coefficient"] == 0:
        raise ValueError("trust_coefficient must be positive: with 0 no adapted tensor would ever move")
    if group["momentum_mode"] not in MOMENTUM_MODES:
        raise ValueError(f"momentum_mode must be one of {', '.join(MOMENTUM_MODES)}, not {group['momentum_mode']!r}")
