"""What a step costs on a cluster, from counts: arithmetic, memory traffic, messages, decoding. Nothing is measured.

An image takes 3 x its forward's flops at the device's rate, and `memory_passes` x the bytes that the forward keeps at
its memory's: convolutions wait for the one, normalisation and activations for the other, and kernels run one after
another, so the times add. Each tensor operation of a pass adds `seconds_per_operation`. Messages cost latency + bytes /
bandwidth (alpha-beta; Thakur, Rabenseifner, Gropp 2005). A step waits for its slowest device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lars.engine.memory import activation_bytes, kept_in
from lars.plan.cluster import Cluster, Device, Link
from lars.recipe.launched import decoders
from lars.recipe.refusal import RecipeError, one_line

BACKWARD = 3  # forward and backward in units of the forward: the backward takes one for inputs, one for weights
# Memory traffic per weight and pass of the order-free sum (reduction.py: norm, copy, scale, round, convert, add).
SUM_BYTES = 60
UPDATE_BYTES = 28  # per weight and step of LARS: seven streams of 4 bytes (norms read weight and gradient again)
INTEGER_BYTES, FLOAT_BYTES = 8, 4  # an element on the wire: the order-free sum, DDP
BUCKET_BYTES = 25 * 2**20  # DDP's bucket_cap_mb: the first layers' gradients come last, and no backward is left to hide
INTERVAL = (0.65, 1.21)
"""A run takes so many times what is planned: 19 of 25 judged rows of tests/benchmarks/plan.json do (10th and 90th
percentile of published / planned)."""


@dataclass(frozen=True)
class Counts:
    """Of a model, for one image of one size; a multiply-add is 2 flops."""

    flops: float  # forward
    kept_bytes: float  # what a float32 forward keeps for the backward
    operations: int  # tensor operations of the forward of a whole pass
    weights: int


RESNET50 = Counts(flops=8_178_368_512, kept_bytes=85_912_824, operations=283, weights=25_557_032)
"""timm's resnet50 at 224 pixels: what a measured `images_per_second` is about."""

VIEW = {"mixed": 1.0, "bilinear": 1.7, "area": 1.4, "tf1_bilinear": 1.5}  # measured: tests/benchmarks/resize.json


@dataclass(frozen=True)
class Work:
    """A run: what a recipe asks for, split into passes."""

    counts: Counts
    evaluated: Counts  # of an image of the evaluation, which may be larger
    validation: int  # samples
    global_batch: int  # as if every device had as many passes as the one that has most
    micro_batch: int
    precision: str
    order_free: bool  # each pass goes through the order-free sum; DDP hides its exchange behind the last backward
    wire_bytes: float  # per gradient element
    image_bytes: float  # an encoded image; 0 where reading and decoding are left out
    view: float = 1.0  # what a training view costs a core, to one of augment.resampling: mixed


@dataclass(frozen=True)
class Step:
    """Seconds of one step of one device."""

    compute: float
    summing: float  # the order-free sum's own memory traffic
    communication: float  # what is not hidden, and waiting for the slowest device
    update: float
    data: float  # reading and decoding the step's images
    decodes: bool  # on the cores that compute

    @property
    def seconds(self) -> float:
        """Images are decoded ahead by other cores, or by the same ones."""
        busy = self.compute + self.summing + self.communication + self.update
        return busy + self.data if self.decodes else max(busy, self.data)

    @property
    def bottleneck(self) -> str:
        """The largest of its parts; the order-free sum is part of exchanging gradients."""
        parts = {
            "compute": self.compute + self.update,
            "communication": self.communication + self.summing,
            "data": self.data,
        }
        return max(parts, key=parts.__getitem__)


class _Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


def count(model: nn.Module, images: int, size: int) -> Counts:
    """Count a forward of `images` images in training mode, on tensors without storage.

    Raises:
        RecipeError: the model looks at its numbers, or cannot take images of that size.
    """
    try:
        kept = activation_bytes(model, (images, 3, size, size))
        with FlopCounterMode(display=False) as flops:
            operations = count_operations(model, images, size)
    except Exception as error:  # each model has its own
        what = f"counted without numbers, on images of {size} pixels"
        raise RecipeError(f"the model cannot be {what}: {one_line(error)}") from None
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Counts(flops.get_total_flops() / images, kept / images, operations, weights)


def count_operations(model: nn.Module, images: int, size: int) -> int:
    """Tensor operations of one forward: with batch-norm groups they grow with the images."""
    shadow = {n: torch.empty_like(t, device="meta") for n, t in (*model.named_parameters(), *model.named_buffers())}
    with _Operations() as operations, torch.no_grad():
        functional_call(model, shadow, (torch.empty((images, 3, size, size), device="meta"),))
    return operations.count


def image_seconds(device: Device, counts: Counts, precision: str) -> float:
    """Training on one image, without the cost per operation."""
    seconds = _counted_seconds(device, counts, precision)
    if device.images_per_second:  # measured on ResNet-50: keep the counted ratio between models, not its level
        used = "bf16" if "bf16" in device.peak else "fp32"
        seconds *= 1 / device.images_per_second / _counted_seconds(device, RESNET50, used)
    return seconds


def _counted_seconds(device: Device, counts: Counts, precision: str) -> float:
    used = precision if precision in device.peak else "fp32"
    arithmetic = BACKWARD * counts.flops / (device.efficiency * device.peak[used])
    return arithmetic + device.memory_passes * kept_in(used, counts.kept_bytes) / device.memory_bandwidth


def ring_seconds(size: float, members: int, link: Link) -> float:
    """All-reduce of `size` bytes in a ring: each member sends 2 (p - 1) messages of size / p."""
    return 2 * (members - 1) * (link.seconds + size / members / link.bytes_per_second)


def halving_doubling_seconds(size: float, members: int, link: Link) -> float:
    """The same bytes in 2 log2(p) messages; members beyond a power of two send theirs to a partner, and get it back."""
    if members == 1:
        return 0.0
    power = 2 ** math.floor(math.log2(members))
    extra = 0.0 if members == power else 2 * (link.seconds + size / link.bytes_per_second)
    return extra + 2 * math.log2(power) * link.seconds + 2 * (power - 1) / power * size / link.bytes_per_second


def all_reduce_seconds(size: float, cluster: Cluster) -> float:
    """The fastest known way: a ring over all devices, or reduce-scatter in nodes, all-reduce between, gather in nodes.

    A node's devices share its network. In the second way each sends 1 / d of the bytes over it.
    """
    inside = min(cluster.devices, cluster.node.devices)
    if cluster.nodes == 1:
        return min(way(size, inside, cluster.link) for way in (ring_seconds, halving_doubling_seconds))
    between = min(way(size, cluster.nodes, cluster.network) for way in (ring_seconds, halving_doubling_seconds))
    slowest = min(cluster.link.bytes_per_second, cluster.network.bytes_per_second)
    flat = ring_seconds(size, cluster.devices, Link(slowest, max(cluster.link.seconds, cluster.network.seconds)))
    return min(flat, ring_seconds(size, inside, cluster.link) + between)


def step_of(work: Work, cluster: Cluster) -> Step:
    """One optimizer step as the loop in recipes/train.py plays it."""
    device, counts = cluster.device, work.counts
    images = work.global_batch / cluster.devices
    passes = images / work.micro_batch
    compute = images * image_seconds(device, counts, work.precision)
    compute += passes * BACKWARD * counts.operations * device.seconds_per_operation
    waiting = compute * cluster.straggling * math.sqrt(2 * math.log(cluster.devices))
    if cluster.devices > 1:
        waiting += _exposed_seconds(work, cluster, compute / passes * (BACKWARD - 1) / BACKWARD)
    return Step(
        compute=compute,
        summing=passes * SUM_BYTES * counts.weights / device.memory_bandwidth if work.order_free else 0.0,
        communication=waiting,
        update=UPDATE_BYTES * counts.weights / device.memory_bandwidth,
        data=images * _data_seconds(work, cluster, work.view),
        decodes=device.decodes,
    )


def _exposed_seconds(work: Work, cluster: Cluster, last_backward: float) -> float:
    """Of the exchange, what no computing hides: DDP hides all that the last backward leaves time for but a bucket."""
    size = work.wire_bytes * work.counts.weights
    exchange = all_reduce_seconds(size, cluster)
    if work.order_free:
        return exchange
    return max(exchange - last_backward, all_reduce_seconds(min(size, BUCKET_BYTES), cluster))


def evaluation_seconds(work: Work, cluster: Cluster) -> float:
    """One evaluation: forwards of the validation split in passes of `micro_batch`, whole passes on each device."""
    images = math.ceil(work.validation / work.micro_batch / cluster.devices) * work.micro_batch
    forward = images * image_seconds(cluster.device, work.evaluated, work.precision) / BACKWARD
    forward += images / work.micro_batch * work.evaluated.operations * cluster.device.seconds_per_operation
    data = images * _data_seconds(work, cluster)
    return forward + data if cluster.device.decodes else max(forward, data)


def _data_seconds(work: Work, cluster: Cluster, view: float = 1.0) -> float:
    """Of one device, per image: the slower of decoding and reading."""
    if not work.image_bytes:
        return 0.0
    node = cluster.node
    cores = node.cores / node.devices if cluster.device.decodes else decoders(node.cores, node.devices)
    decode = view * (node.seconds_per_image + work.image_bytes / node.decode_bytes_per_second) / cores
    return max(decode, work.image_bytes * min(cluster.devices, node.devices) / node.storage_bytes_per_second)
