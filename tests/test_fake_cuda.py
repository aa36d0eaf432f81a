"""A step of training on pretended GPUs: no mix of devices, and the processor waits for the device once a step.

torch's FakeTensorMode dispatches every operation with its devices, shapes and strides and computes nothing, so no GPU
is needed. It cannot run a backward of CUDA tensors, so gradients are put in; all else is the code that trains.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lars.data.loader import Batch
from lars.engine.build import build_model, build_optimizer
from lars.engine.plain import Plain
from lars.exact.reduction import OrderFreeSum
from lars.optim.registry import optimizers
from lars.recipe import config
from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe
from lars.recipe.schedule import Schedule
from recipes.alexnet import model as alexnet_bn  # noqa: F401  registers alexnet_bn with timm
from recipes.train import Training

ALLOWED = OrderFreeSum._read.__code__  # the one place where a step waits for its device
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten._copy_from.default)
PASSES = 2


class AsOnGPU(TorchDispatchMode):
    """Refuses what a GPU cannot do, or what would make the processor wait for it; counts the copies of `ALLOWED`."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in given if t.ndim or t.device.type == "cuda"}  # a number may lie on the CPU
        if func is torch.ops.aten._local_scalar_dense.default:
            assert devices != {"cuda"}, "a value is read from the device, as .item() and .tolist() do"
            return 0  # of a CPU tensor, whose value nobody knows here
        if func in COPIES:
            made = [torch.device(kwargs["device"]).type] if kwargs.get("device") else []
            blocking = not (args[2:3] or [kwargs.get("non_blocking")])[0]
            if {t.device.type for t in given} | {*made} == {"cpu", "cuda"} and blocking:
                assert _inside(ALLOWED), f"a blocking copy: {func} of {[tuple(t.shape) for t in given]}"
                self.waits += 1
        else:
            assert len(devices) < 2, f"{func} mixes CPU and CUDA: {[(t.device.type, tuple(t.shape)) for t in given]}"
        return func(*args, **kwargs)


def _inside(code: Any) -> bool:
    frame = sys._getframe()
    while frame := frame.f_back:
        if frame.f_code is code:
            return True
    return False


class KnownSums(OrderFreeSum):
    """What is read from the device has no values here: every parameter had its gradients, and all are finite."""

    def _read(self) -> tuple[list[int], Tensor, Tensor, int, list[int]]:
        presence, high, low, _, counts = super()._read()
        return [self.passes] * len(presence), high, low, 0, [0] * len(counts)


class Pretended(Plain):
    """The engine of one process on a GPU, without accelerate's search for one, and with gradients put in."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.device, self.rank = recipe, torch.device("cuda"), 0

    def backward(self, loss: Tensor, passes: int) -> None:
        assert loss.device.type == "cuda"
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in trained[1:]:  # one has none, as an unused layer
            p.grad = torch.empty_like(p)


def batches(recipe: Recipe, plan: BatchPlan) -> Iterator[Batch]:
    """Pixels as the loader delivers them: on the CPU, channels last in memory."""
    count, size = plan.micro_batch, recipe.model.image_size
    while True:
        images = torch.empty(count, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        yield Batch(images, torch.zeros(count, dtype=torch.int64), np.arange(count), 0)


def to_gpu(model: nn.Module, channels_last: bool) -> None:
    """What `model.to` does, which cannot exchange the insides of tensors that pretend."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                many = p.ndim == 4 and channels_last
                layout = torch.channels_last if many else torch.contiguous_format
                module._parameters[name] = nn.Parameter(torch.empty_like(p, device="cuda", memory_format=layout))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    model.to = lambda *_, **__: model


def training(path: Path, *overrides: str) -> Training:
    """A run of the recipe on one pretended GPU, two passes a step, ready for `train_step`."""
    recipe = config.load(path, list(overrides))
    recipe.global_batch = PASSES * 2 * (recipe.bn_group or 4)
    recipe.runtime.micro_batch = 2 * (recipe.bn_group or 4)
    run = object.__new__(Training)
    run.recipe, run.plan = recipe, BatchPlan.of(recipe, 100_000, 1)
    run.rank, run.step, run.samples_hash, run.bad_images, run.data_error = 0, 0, 0, 0, None
    run.schedule = Schedule.of(recipe, run.plan)
    run.watchdog = SimpleNamespace(at=lambda *_: None)
    run.stop = SimpleNamespace(agreed=lambda: False)
    model, ghosts = build_model(recipe)
    run.engine = Pretended(recipe)
    to_gpu(model, recipe.runtime.channels_last)
    run.engine.prepare(model, ghosts)
    run.engine.wrap(build_optimizer(recipe, model), run.plan)
    sums = run.engine.sums(run.plan.passes, counts=3)
    named = list(zip(sums.names, sums.parameters))
    run.sums = KnownSums(named, sums.passes, len(sums.high), counts=3, device=run.engine.device)
    return run


def play(run: Training, steps: int = 2) -> AsOnGPU:
    """Real steps of the loop; the first one also makes the optimizer's state."""
    micro, source = run.plan.micro_batch, batches(run.recipe, run.plan)
    slots = [range(i * micro, (i + 1) * micro) for i in run.plan.local_passes(0)]
    loader = SimpleNamespace(take=lambda count: next(source))
    with AsOnGPU() as watched:
        for _ in range(steps):
            loss, _ = run.train_step(loader, slots)
            assert loss is not None
    return watched


@pytest.mark.parametrize(
    ("path", "channels_last"),
    [
        (DEMO / "alexnet.yaml", "true"),
        (DEMO / "resnet50.yaml", "false"),
        (ROOT / "recipes/alexnet/lars-b32k-100ep.yaml", "false"),
        (ROOT / "recipes/resnet50/lars-b32k-90ep.yaml", "true"),
    ],
    ids=("demo alexnet", "demo resnet50", "alexnet_bn", "resnet50"),
)
@pytest.mark.filterwarnings("ignore:CUDA is not available")  # autocast stays off: dtypes are not what is looked at
def test_a_step_mixes_no_devices_and_waits_for_the_device_once(path: Path, channels_last: str) -> None:
    with FakeTensorMode():
        run = training(path, f"runtime.channels_last={channels_last}")
        assert play(run, steps=2).waits == 2
        weights = {p.device.type for p in run.engine.model.state_dict().values()}
        velocities = {t.device.type for state in run.engine.optimizer.state.values() for t in state.values()}
    assert run.step == 2 and weights == velocities == {"cuda"}


ADAM = ("optimizer.beta1=0.9", "optimizer.beta2=0.999", "optimizer.adam_eps=1e-6", "clip_norm=1", "ema_decay=0.9")


@pytest.mark.parametrize("name", optimizers())
def test_so_does_one_of_every_optimizer(name: str) -> None:
    """Those of Adam's with a clipped gradient and averaged weights."""
    keys = ADAM if name in ("lamb", "adamw") else ()
    with FakeTensorMode():
        assert play(training(DEMO / "alexnet.yaml", f"optimizer.name={name}", *keys), steps=2).waits == 2


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_so_does_one_that_mixes_images(mixing: str) -> None:
    with FakeTensorMode():
        assert play(training(DEMO / "resnet50.yaml", f"augment.{mixing}=0.2"), steps=1).waits == 1


def put_cpu_tensor(run: Training) -> None:
    """The statistics of a batch norm stay behind on the CPU."""
    run.engine.mean = run.engine.mean.cpu()


def put_item(run: Training) -> None:
    """Somebody logs the loss in every pass."""
    forward = run.engine.forward

    def logged(*batch: Any) -> Tensor:
        loss = forward(*batch)
        loss.item()
        return loss

    run.engine.forward = logged


def put_tolist(run: Training) -> None:
    """Somebody prints the trust ratios in every step."""
    step = run.engine.step

    def printed(lr: float, number: int) -> bool:
        done = step(lr, number)
        run.engine.optimizer.applied_ratios()
        return done

    run.engine.step = printed


def put_blocking_copy(run: Training) -> None:
    """The sums learn in every pass which parameters had a gradient, from a list on the CPU."""
    add = run.sums.add_gradients

    def told() -> None:
        torch.tensor([True, False], device=run.engine.device)
        add()

    run.sums.add_gradients = told


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (put_cpu_tensor, "mixes CPU and CUDA"),
        (put_item, "a value is read from the device"),
        (put_tolist, "a value is read from the device"),
        (put_blocking_copy, "a blocking copy"),
    ],
)
def test_what_does_not_belong_in_a_step_is_noticed(fault: Any, message: str) -> None:
    with FakeTensorMode():
        run = training(DEMO / "alexnet.yaml")
        fault(run)
        with pytest.raises(AssertionError, match=message):
            play(run, steps=1)


@pytest.mark.parametrize(("promise", "told"), [("bitwise", 1), ("numeric", 0)])
def test_memory_that_ran_short_is_told_once_where_bits_are_promised(
    promise: str, told: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeTensorMode():
        run = training(DEMO / "alexnet.yaml")
        run.engine.recipe.runtime.deterministic = promise == "bitwise"
        play(run, steps=1)
        assert not caplog.records
        monkeypatch.setattr("torch.cuda.memory_stats", lambda device: {"num_alloc_retries": 3})
        play(run, steps=2)
    assert [record.message.count("ran short 3 times") for record in caplog.records] == [1] * told
