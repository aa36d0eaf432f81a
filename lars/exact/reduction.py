"""The order-free sum: the same bits whatever the order or grouping of passes and processes.

Floating-point addition depends on its order, integer addition does not. So a pass's gradient is multiplied by a power
of two, rounded to an integer of 64 bits, and integers are what is added over passes and processes (`all_reduce`, any
number of them). The rest of a step rides in the same message: batch-norm statistics, the loss, counters.

Range and rounding. With V passes and elements below 2^RANGE_BITS the scale 2^(62 - RANGE_BITS - ceil(log2 V)) cannot
overflow; each pass is rounded by at most half a unit of that scale. An element outside the range, an infinity or a NaN
is counted under its parameter's name and never enters a step.
"""

from __future__ import annotations

import math
from ctypes import CDLL
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lars.exact.kernels import kernels

RANGE_BITS = 14  # |gradient element of one pass| < 16,384
_BAD = 1 << 32  # a parameter's count: passes that had a gradient, plus this for each that was out of range
_HIGH_BITS, _LOW_BITS = 8, 48  # exact floats are stored as two integers, of 1/2^8 and of 1/2^48
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 24}  # elements converted at a time: in cache on a CPU, few launches on a GPU


@dataclass
class StepSums:
    """What a whole step came to, over all passes of all processes."""

    bad_gradients: list[str]  # parameters whose gradient was not finite or out of range in some pass
    bad_floats: int  # numbers that were not finite (or beyond 2^40) and count as zero in `floats`
    floats: Tensor  # float64, on the CPU
    counts: list[int]


class OrderFreeSum:
    """Adds the passes of a step; `finish` adds the processes, writes mean gradients to `.grad` and starts anew.

    Args:
        parameters: (name, parameter) whose gradients are summed; empty where DDP sums them.
        passes: V, the passes of a step over all processes.
        floats: how many float64 numbers ride along (loss and statistics); each below 2^40 in size.
        counts: how many integers ride along; they add modulo 2^64.
    """

    def __init__(
        self, parameters: list[tuple[str, nn.Parameter]], passes: int, floats: int, counts: int, device: torch.device
    ) -> None:
        self.names = [name for name, _ in parameters]
        self.parameters = [p for _, p in parameters]
        self.passes = passes
        self.scale = 2.0 ** (62 - RANGE_BITS - math.ceil(math.log2(passes)))
        elements = sum(p.numel() for p in self.parameters)
        self.sizes = [elements, len(self.parameters), floats, floats, 1, counts]
        self.total = torch.zeros(sum(self.sizes), dtype=torch.int64, device=device)
        self.gradients, self.presence, self.high, self.low, self.bad, self.counts = self.total.split(self.sizes)
        # What this process knows without its device goes there once a step: a copy for each pass would hold up a GPU.
        self.had, self.counted = (torch.zeros(size, dtype=torch.int64) for size in (len(self.parameters), counts))
        self.begun = False  # the first pass of a step is stored, the others are added to it
        self.flat = torch.zeros(elements, device=device)  # float32: one pass's gradient, then the step's mean
        self.kernels = kernels() if device.type == "cpu" else None
        self.chunk = min(_CHUNK.get(device.type, 1 << 17), max(elements, 1))
        self.scratch_float = torch.empty(self.chunk, device=device)
        self.scratch_int = torch.empty(self.chunk, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the gradient of one pass (of the mean over its samples) and clear it."""
        if not self.parameters:
            return
        self.had += torch.tensor([p.grad is not None for p in self.parameters])
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        fits = self._add_with(self.kernels, grads) if self.kernels else self._add(grads)
        self.begun = True
        if not fits:
            largest = torch.stack(torch._foreach_norm(grads, math.inf))
            self.presence += torch.where(largest < 2.0**RANGE_BITS, 0, _BAD)  # NaN compares false
        for p in self.parameters:
            p.grad = None

    def _add_with(self, kernels: CDLL, grads: list[Tensor]) -> bool:
        """Add to `gradients`, or store there; False if an element is out of range."""
        bad, how = 0, (self.scale, 2.0**RANGE_BITS, not self.begun)
        for g, total in zip(grads, self.gradients.split([g.numel() for g in grads])):
            g = g.contiguous().float()
            bad |= kernels.lars_add_pass(g.data_ptr(), total.data_ptr(), g.numel(), *how)
        return not bad

    def _add(self, grads: list[Tensor]) -> bool:
        """As `_add_with`, on any device; a GPU is not waited for, so there it is False throughout."""
        torch.cat([g.reshape(-1) for g in grads], out=self.flat)
        looks = fits = self.flat.device.type == "cpu"  # at each chunk while it is in cache
        for values, total in zip(self.flat.split(self.chunk), self.gradients.split(self.chunk)):
            rounded, whole = self.scratch_float[: len(values)], self.scratch_int[: len(values)]
            if looks:
                least, most = values.aminmax()
                fits &= -(2.0**RANGE_BITS) < least.item() and most.item() < 2.0**RANGE_BITS  # NaN compares false
            torch.mul(values, self.scale, out=rounded)
            rounded.round_()
            if self.begun:
                total += whole.copy_(rounded)
            else:
                total.copy_(rounded)
        return fits

    @torch.no_grad()
    def add_floats(self, values: Tensor) -> None:
        """Add numbers of one pass as float64, each exact to 2^-49."""
        values = values.double()
        fits = values.abs() < 2.0**40
        self.bad += (~fits).sum()
        values = torch.where(fits, values, 0.0)
        high = (values * 2.0**_HIGH_BITS).round()
        self.high += high.long()
        self.low += ((values - high / 2.0**_HIGH_BITS) * 2.0**_LOW_BITS).round().long()

    def add_counts(self, values: list[int]) -> None:
        """Add integers modulo 2^64."""
        signed = [((value + 2**63) % 2**64) - 2**63 for value in values]
        self.counted += torch.tensor(signed, dtype=torch.int64)

    @torch.no_grad()
    def finish(self) -> StepSums:
        """Add over processes. Each `.grad` becomes the mean over the global batch (None if nobody had one)."""
        for total, here in ((self.presence, self.had), (self.counts, self.counted)):
            total += here.to(self.total.device, non_blocking=True)
            here.zero_()
        if not self.begun:
            self.gradients.zero_()
        if dist.is_initialized():
            dist.all_reduce(self.total)
        presence, high, low, bad, counts = self._read()
        bad_gradients = [name for name, count in zip(self.names, presence) if count >= _BAD]
        if not bad_gradients:
            factor = 1.0 / (self.scale * self.passes)
            if self.kernels:
                where = self.gradients.data_ptr(), self.flat.data_ptr(), self.gradients.numel()
                self.kernels.lars_mean(*where, factor)
            else:
                for total, mean in zip(self.gradients.split(self.chunk), self.flat.split(self.chunk)):
                    mean.copy_(total.double().mul_(factor))
            views = self.flat.split([p.numel() for p in self.parameters])
            for p, view, count in zip(self.parameters, views, presence):
                mean = view.view_as(p)
                if not p.is_contiguous():  # channels last: optimizers want the parameter's own strides
                    mean = torch.empty_like(p).copy_(mean)
                p.grad = mean if count else None
        floats = high.double() / 2.0**_HIGH_BITS + low.double() / 2.0**_LOW_BITS
        sums = StepSums(bad_gradients, int(bad), floats, [value % 2**64 for value in counts])
        self.total[len(self.gradients) :].zero_()
        self.begun = False
        return sums

    def _read(self) -> tuple[list[int], Tensor, Tensor, int, list[int]]:
        """Presence, floats, bad floats and counts: the one place of a step where the processor waits for the device."""
        numbers = self.total[len(self.gradients) :].cpu()
        presence, high, low, bad, counts = numbers.split(self.sizes[1:])
        return presence.tolist(), high, low, int(bad), counts.tolist()
