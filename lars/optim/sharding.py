"""Exact norms over an engine's slices: `bind` tells LARS which part of which layer each local tensor is.

ZeRO gives an optimizer one flat partition per parameter group (or sub-group), and a norm of it is the norm of nothing
(deepspeedai/DeepSpeed issues 88, 490, 1217). Bound, LARS takes the squared norms of its slices, layer by layer, adds
them over the processes in one all-reduce per call of `step()`, and applies the rule to views of the partition.
DeepSpeed calls `step()` once per parameter group, and stage 3 once per sub-group; groups that are not adapted exchange
nothing, so LARS's default groups cost one all-reduce per optimizer step (stage 3: one per `sub_group_size` elements).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lars.optim.base import Optimizer, ShardingError
from lars.optim.norms import roots


class Piece(NamedTuple):
    """A slice of a layer: `length` elements of the flattened parameter, from `start` on."""

    layer: int
    start: int
    length: int
    offset: int = 0  # where it begins in the engine's flat tensor; a DTensor holds one slice

    def of(self, tensor: Tensor) -> Tensor:
        """A view of the slice in the engine's tensor, its gradient or its velocity."""
        if isinstance(tensor, DTensor):
            return tensor.to_local()
        return tensor.view(-1).narrow(0, self.offset, self.length)


@dataclass
class Layout:
    """Where the slices of layers stand in the tensors that an engine's optimizer holds."""

    group: dist.ProcessGroup | None
    parameters: list[Tensor]  # the model's own, one for each layer
    sizes: list[int]  # their elements
    pieces: dict[Tensor, list[Piece]] = field(default_factory=dict)  # by the engine's tensor
    _indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def cut(self, tensor: Tensor) -> list[Piece]:
        """The slices in one of the optimizer's tensors; those without elements are left out."""
        if tensor not in self.pieces:
            raise ShardingError("an engine has put a tensor into LARS that was not there at bind: bind again")
        return self.pieces[tensor]

    def norms(self, layers: list[list[int]], norms: list[Tensor], device: torch.device) -> list[Tensor]:
        """Norms of whole layers from those of slices, with one all-reduce; all processes call it together.

        Args:
            layers: for each group of slices the numbers of their layers.
            norms: for each group (2, slices), of weights and of gradients, float32. The answer has these shapes too.
        """
        indices = [self._index(numbers, device) for numbers in layers]
        squares = torch.zeros(2, len(self.parameters), device=device)
        for index, some in zip(indices, norms):
            squares.index_add_(1, index, some.square())
        dist.all_reduce(squares, group=self.group)
        whole = roots(squares)
        return [whole.index_select(1, index) for index in indices]

    def _index(self, layers: list[int], device: torch.device) -> Tensor:
        """Layer numbers as a tensor, kept: to make one anew in each step would be a copy that a GPU has to wait for."""
        key = tuple(layers)
        if key not in self._indices:
            self._indices[key] = torch.tensor(layers, device=device)
        return self._indices[key]

    def gather(self, value_of: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(model's parameter, whole flat value) for each layer, on all processes; iterate to the end on each.

        Args:
            value_of: from one of the optimizer's float32 tensors to the tensor wanted: itself, or its velocity.
        """
        held: dict[int, list[tuple[Tensor, Piece]]] = {}
        for tensor, pieces in self.pieces.items():
            for piece in pieces:
                held.setdefault(piece.layer, []).append((tensor, piece))
        device = next(iter(self.pieces)).device
        for layer, (parameter, size) in enumerate(zip(self.parameters, self.sizes)):
            whole = torch.zeros(size, device=device)
            for tensor, piece in held.get(layer, []):
                whole[piece.start : piece.start + piece.length] = piece.of(value_of(tensor))
            dist.all_reduce(whole.view(torch.int32), group=self.group)  # bits, so that -0.0 stays -0.0
            yield parameter, whole

    def scatter(self, whole_of: Callable[[Tensor], Tensor | None], value_of: Callable[[Tensor], Tensor]) -> None:
        """The reverse of `gather`: cut this process's slices out of whole values (None leaves a layer as it is)."""
        for tensor, pieces in self.pieces.items():
            for piece in pieces:
                whole = whole_of(self.parameters[piece.layer])
                if whole is not None:
                    piece.of(value_of(tensor)).copy_(whole.reshape(-1)[piece.start : piece.start + piece.length])


def bind(model: nn.Module, optimizer: Any) -> None:
    """Tell `optimizer` where the engine that `model` is keeps its slices: LARS then has the norms of whole layers.

    Args:
        model: what `accelerator.prepare` or `deepspeed.initialize` returned, a DDP or FSDP2 module, or a plain module.
        optimizer: the LARS (or another `lars.optim.base.Optimizer`), or what an engine wrapped around it.

    Raises:
        ShardingError: the layout cannot be made exact (optimizer offload), is not the one this code knows, or the rule
            needs whole tensors.
        TypeError: there is no LARS inside `optimizer`.
    """
    rule = _unwrap(optimizer)
    zero = getattr(model, "optimizer", None) if hasattr(model, "zero_optimization_stage") else None
    in_partitions = zero is not None and zero is not rule
    tensors = [p for group in rule.param_groups for p in group["params"]]
    in_dtensors = any(isinstance(p, DTensor) for p in tensors)
    if rule.slices == "refused" and (in_partitions or in_dtensors):
        raise ShardingError(f"{type(rule).__name__} needs whole tensors: train it with plain data parallel or DDP")
    if in_partitions:
        rule.layout = _of_deepspeed(zero)
    elif in_dtensors:
        rule.layout = _of_dtensors(tensors)
    else:
        rule.layout = None
        rule.refuse_slices()


def _unwrap(optimizer: Any) -> Optimizer:
    """What is inside accelerate's and DeepSpeed's wrappers, which all call what they wrap `optimizer`."""
    while not isinstance(optimizer, Optimizer):
        if getattr(optimizer, "optimizer", None) is None:
            raise TypeError(f"bind needs a lars.LARS, and there is none in {type(optimizer).__name__}")
        optimizer = optimizer.optimizer
    return optimizer


def _of_deepspeed(zero: Any) -> Layout:
    """The layout of DeepSpeed's own optimizer, read from the attributes that its stages keep."""
    if any(getattr(zero, flag, False) for flag in ("cpu_offload", "offload_optimizer", "swap_optimizer")):
        raise ShardingError(
            "the optimizer is offloaded, where DeepSpeed steps on copies: set offload_optimizer to none"
        )
    import deepspeed

    slices_of = {
        "DeepSpeedZeroOptimizer": _of_stage_1_or_2,
        "DeepSpeedZeroOptimizer_Stage3": _of_stage_3,
        "BF16_Optimizer": _of_bf16_stage_1,
    }.get(type(zero).__name__)
    name = f"{type(zero).__name__} of DeepSpeed {deepspeed.__version__}"
    if slices_of is None:
        raise ShardingError(f"{name} is not a layout that LARS knows")
    try:
        group = zero.dp_process_group if slices_of is _of_stage_3 else zero.real_dp_process_group[0]
        slices = list(slices_of(zero))
    except (AttributeError, IndexError, TypeError) as error:
        raise ShardingError(f"{name} is not laid out as LARS knows it: {error}") from error
    sizes = {parameter: size for _, parameter, size, *_ in slices}
    numbers = {parameter: layer for layer, parameter in enumerate(sizes)}
    layout = Layout(group, list(sizes), list(sizes.values()), {flat: [] for flat, *_ in slices})
    for flat, parameter, _, offset, start, length in slices:
        if length:
            layout.pieces[flat].append(Piece(numbers[parameter], start, length, offset))
    if not _is_complete(layout):
        raise ShardingError(f"{name} does not hold every weight once: its layout has changed")
    return layout


def _is_complete(layout: Layout) -> bool:
    """Whether all processes together hold every element of every layer exactly once."""
    held = torch.zeros(2, len(layout.sizes), dtype=torch.int64)
    for pieces in layout.pieces.values():
        for layer, start, length, _ in pieces:
            held[:, layer] += torch.tensor([length, length * (2 * start + length - 1) // 2])  # count, sum of positions
    held = held.to(next(iter(layout.pieces)).device)
    dist.all_reduce(held, group=layout.group)
    return held.tolist() == [layout.sizes, [n * (n - 1) // 2 for n in layout.sizes]]


# flat tensor, parameter, its elements; where the slice starts in the flat tensor and in the parameter; its length
Slice = tuple[Tensor, Tensor, int, int, int, int]


def _overlap(flat: Tensor, p: Tensor, offset: int, begin: int) -> Slice:
    """The part of a parameter at `offset` of a group's buffer that lies in the partition [begin, begin + len(flat))."""
    first, last = max(offset, begin), min(offset + p.numel(), begin + flat.numel())
    return flat, p, p.numel(), max(first - begin, 0), max(first - offset, 0), max(last - first, 0)


def _of_stage_1_or_2(zero: Any) -> Iterator[Slice]:
    for i, flat in enumerate(zero.single_partition_of_fp32_groups):
        begin = dist.get_rank(zero.real_dp_process_group[i]) * zero.partition_size[i]
        # The order in the buffer is the round-robin one; `_hp_mapping` follows it only where there is padding.
        for p, offset in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
            yield _overlap(flat, p, offset, begin)


def _of_bf16_stage_1(zero: Any) -> Iterator[Slice]:
    """DeepSpeed's `bf16` section on stage 1 with float32 accumulation: bf16 weights, float32 masters in partitions."""
    for i, flat in enumerate(zero.fp32_groups_flat_partition):
        begin, offset = dist.get_rank(zero.real_dp_process_group[i]) * flat.numel(), 0
        for p in zero.bf16_groups[i]:
            yield _overlap(flat, p, offset, begin)
            offset += p.numel()


def _of_stage_3(zero: Any) -> Iterator[Slice]:
    rank = dist.get_rank(zero.dp_process_group)
    for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        offset = 0
        for p in parameters:
            part = p.partition_numel()
            start = rank * part
            held = min(max(p.ds_numel - start, 0), part)  # the rest is padding
            yield flat, p, p.ds_numel, offset, start, held
            offset += part


def _of_dtensors(tensors: list[Tensor]) -> Layout:
    """FSDP2: DTensor's own norms are exact too, at two collectives per tensor; here it is one for all."""
    cut = [p for p in tensors if isinstance(p, DTensor)]
    meshes = {p.device_mesh for p in cut}
    if len(meshes) != 1 or len(cut) != len(tensors):
        raise ShardingError(
            "some parameters are sharded over one device mesh and some are not: shard the whole model on one"
        )
    sharded = {tuple(i for i, place in enumerate(p.placements) if isinstance(place, Shard)) for p in cut}
    dimensions, *others = sharded
    if others or len(dimensions) != 1 or any(place.is_partial() for p in cut for place in p.placements):
        raise ShardingError("parameters must be sharded over exactly one dimension of the device mesh")
    layout = Layout(meshes.pop().get_group(dimensions[0]), tensors, [p.numel() for p in tensors])
    for layer, p in enumerate(cut):
        # `start` is for flat slices only; whole DTensors come from `full_tensor`
        layout.pieces[p] = [Piece(layer, 0, length)] if (length := p.to_local().numel()) else []
    return layout
