"""Exact norms over an engine's slices: `bind` tells LARS which part of which layer each local tensor is.

ZeRO gives an optimizer one flat partition per parameter group (or sub-group), and a norm of it is the norm of nothing
(deepspeedai/DeepSpeed issues 88, 490, 1217). Bound, LARS takes the squared norms of the slices it holds, layer by layer,
adds them over the processes in one all-reduce per call of `step()`, and applies the rule to views of the partition.
DeepSpeed calls `step()` once per parameter group, and stage 3 once per sub-group; groups that are not adapted exchange
nothing, so LARS's default groups cost one all-reduce per optimizer step (stage 3: one per `sub_group_size` elements).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lars.optimizer import LARS, ShardingError

View = Callable[[Tensor], Tensor]


@dataclass
class Layout:
    """Where the slices of layers stand in the tensors that an engine's optimizer holds.

    pieces: {id(tensor): [(layer, view)]}; the view cuts the layer's slice out of that tensor, its gradient or velocity.
    """

    layers: int
    group: dist.ProcessGroup | None
    pieces: dict[int, list[tuple[int, View]]] = field(default_factory=dict)

    def cut(self, tensor: Tensor) -> list[tuple[int, View]]:
        """The slices in one of the optimizer's tensors; those without elements are left out."""
        if id(tensor) not in self.pieces:
            raise ShardingError("an engine has put a tensor into LARS that was not there at bind: bind again")
        return self.pieces[id(tensor)]

    def squared_norms(self, squares: Tensor) -> Tensor:
        """Sum over processes, shape (2, layers): squared norms of weights and of gradients, in float32."""
        dist.all_reduce(squares, group=self.group)
        return squares


def bind(model: nn.Module, optimizer: Any) -> None:
    """Make `optimizer`'s norms those of whole layers under the engine that `model` is.

    Args:
        model: what `accelerator.prepare` or `deepspeed.initialize` returned, a DDP or FSDP2 module, or a plain module.
        optimizer: the LARS, or what an engine wrapped around it.

    Raises:
        ShardingError: the layout cannot be made exact (optimizer offload), or is not the one this code knows.
        TypeError: there is no LARS inside `optimizer`.
    """
    lars = _unwrap(optimizer)
    zero = getattr(model, "optimizer", None) if hasattr(model, "zero_optimization_stage") else None
    tensors = [p for group in lars.param_groups for p in group["params"]]
    if zero is not None and zero is not lars:
        lars.layout = _of_deepspeed(zero)
    elif any(isinstance(p, DTensor) for p in tensors):
        lars.layout = _of_dtensors(tensors)
    else:
        lars.layout = None
        lars.refuse_slices()


def _unwrap(optimizer: Any) -> LARS:
    """The LARS inside accelerate's and DeepSpeed's wrappers, which all call what they wrap `optimizer`."""
    while not isinstance(optimizer, LARS):
        if getattr(optimizer, "optimizer", None) is None:
            raise TypeError(f"bind needs a lars.LARS, and there is none in {type(optimizer).__name__}")
        optimizer = optimizer.optimizer
    return optimizer


def _of_deepspeed(zero: Any) -> Layout:
    """The layout of DeepSpeed's own optimizer, read from the attributes that its stages keep."""
    if any(getattr(zero, flag, False) for flag in ("cpu_offload", "offload_optimizer", "swap_optimizer")):
        raise ShardingError("the optimizer is offloaded, where DeepSpeed steps on copies: set offload_optimizer to none")
    readers = {"DeepSpeedZeroOptimizer": _of_stage_1_or_2, "DeepSpeedZeroOptimizer_Stage3": _of_stage_3}
    name = type(zero).__name__
    if name not in readers:
        raise ShardingError(f"{name} of {_deepspeed_version()} is not a layout that LARS knows")
    try:
        group, slices = readers[name](zero)
        slices = list(slices)
    except (AttributeError, IndexError, TypeError) as error:
        raise ShardingError(f"{name} of {_deepspeed_version()} is not laid out as LARS knows it: {error}") from error
    numbers: dict[int, int] = {}
    sizes: list[int] = []
    layout = Layout(0, group)
    found: list[tuple[int, int]] = []
    for flat, parameter, size, start, length in slices:
        layer = numbers.setdefault(id(parameter), len(numbers))
        if layer == len(sizes):
            sizes.append(size)
        pieces = layout.pieces.setdefault(id(flat), [])
        if length:
            pieces.append((layer, lambda t, start=start, length=length: t.view(-1).narrow(0, start, length)))
            found.append((layer, length))
    layout.layers = len(sizes)
    _check_complete(sizes, found, group, name, slices[0][0].device)
    return layout


def _check_complete(sizes: list[int], found: list[tuple[int, int]], group: Any, name: str, device: torch.device) -> None:
    """All processes together must hold every element of every layer exactly once."""
    held = torch.zeros(len(sizes), dtype=torch.int64, device=device)
    for layer, length in found:
        held[layer] += length
    dist.all_reduce(held, group=group)
    if held.tolist() != sizes:
        raise ShardingError(f"{name} of {_deepspeed_version()} does not hold every weight once: its layout has changed")


Slice = tuple[Tensor, Tensor, int, int, int]  # flat tensor, parameter, its elements, start in the flat tensor, length


def _of_stage_1_or_2(zero: Any) -> tuple[Any, Iterator[Slice]]:
    def slices() -> Iterator[Slice]:
        for i, flat in enumerate(zero.single_partition_of_fp32_groups):
            begin = dist.get_rank(zero.real_dp_process_group[i]) * zero.partition_size[i]
            # The order in the buffer is the round-robin one; `_hp_mapping` follows it only where there is padding.
            for p, offset in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
                start = max(offset - begin, 0)
                stop = min(offset + p.numel() - begin, zero.partition_size[i])
                yield flat, p, p.numel(), start, max(0, stop - start)

    return zero.real_dp_process_group[0], slices()


def _of_stage_3(zero: Any) -> tuple[Any, Iterator[Slice]]:
    group = zero.dp_process_group

    def slices() -> Iterator[Slice]:
        for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            offset = 0
            for p in parameters:
                part = p.partition_numel()
                held = min(max(p.ds_numel - dist.get_rank(group) * part, 0), part)  # the rest is padding
                yield flat, p, p.ds_numel, offset, held
                offset += part

    return group, slices()


def _of_dtensors(tensors: list[Tensor]) -> Layout:
    """FSDP2: DTensor's own norms are exact too, at two collectives per tensor; here it is one for all."""
    meshes = {p.device_mesh for p in tensors if isinstance(p, DTensor)}
    if len(meshes) != 1 or not all(isinstance(p, DTensor) for p in tensors):
        raise ShardingError("some parameters are sharded over one device mesh and some are not: shard the whole model on one")
    sharded = {tuple(i for i, place in enumerate(p.placements) if isinstance(place, Shard)) for p in tensors}
    if len(sharded) != 1 or len(next(iter(sharded))) != 1 or any(place.is_partial() for p in tensors for place in p.placements):
        raise ShardingError("parameters must be sharded over exactly one dimension of the device mesh")
    layout = Layout(len(tensors), next(iter(meshes)).get_group(next(iter(sharded))[0]))
    for layer, p in enumerate(tensors):
        layout.pieces[id(p)] = [(layer, lambda t: t.to_local())] if p.to_local().numel() else []
    return layout


def _deepspeed_version() -> str:
    import deepspeed

    return f"DeepSpeed {deepspeed.__version__}"
