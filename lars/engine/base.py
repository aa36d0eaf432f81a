"""What an engine does; plain data parallel, DDP, DeepSpeed and FSDP2 each fill in what they do in their own way.

The base holds what is the same on all of them: device, pinned arithmetic, forward and batch-norm statistics of a pass.
An engine says how the gradients of passes and processes come together (`wrap`, `exchange`, `backward`, `bad_gradients`,
`update`) and where weights and optimizer state lie (`weights`, `momentum`, `load_momentum`).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor, nn

from lars.data.malloc import keep_freed
from lars.data.mix import group_size, mix
from lars.engine.average import Average, named_in_checkpoint, parted
from lars.exact.ghost_batchnorm import GhostBatchNorm2d, update_running
from lars.exact.kernels import kernels
from lars.exact.keyed import Purpose, mix64
from lars.exact.reduction import OrderFreeSum
from lars.optim import norms
from lars.optim.base import Optimizer
from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe
from lars.recipe.launched import Launched, uses_cpu, uses_deepspeed
from lars.recipe.refusal import RecipeError


class Engine(ABC):
    """Forward and backward of a pass on this process's device, the same for every number of processes.

    `model` is the model itself, `train_module` and `eval_module` are what the engine made of it.
    """

    exchanges_gradients = True  # this engine adds them over processes itself; if not, the order-free sum does
    weights_may_be_channels_last = False  # a sharded weight is cut from contiguous memory
    reproducibility = "numeric"
    average: Average | None = None  # of the weights, if the recipe wants one

    def __init__(self, recipe: Recipe, launched: Launched) -> None:
        self.recipe = recipe
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        self.accelerator = Accelerator(
            cpu=uses_cpu() and not uses_deepspeed(),  # for accelerate `cpu=True` is a refusal of DeepSpeed
            mixed_precision="no",  # autocast is ours: the recipe sets the precision, never the launch file
            log_with=recipe.trackers or None,
            project_dir=recipe.run_dir,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
        self.device = self.accelerator.device
        self.rank = self.accelerator.process_index
        _assert_processes(self.accelerator, launched.processes)
        self.pin_arithmetic()
        if self.device.type == "cpu":
            keep_freed()

    def pin_arithmetic(self) -> None:
        """Settle what changes bits; again once the engine is built: accelerate and engines have their own ideas."""
        tf32, deterministic = self.recipe.precision != "fp32", self.recipe.runtime.deterministic
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            if self.device.type == "cpu":
                torch.set_num_threads(1)  # the number of threads changes the bits, and launchers set it as they like
            torch.use_deterministic_algorithms(True)
            # filling memory finds bugs, and costs a memory pass per allocation
            torch.utils.deterministic.fill_uninitialized_memory = False

    def assert_pinned(self) -> None:
        """Before the first step: nothing that was built since has changed what `pin_arithmetic` settled."""
        if self.recipe.runtime.deterministic:
            threads = torch.get_num_threads() if self.device.type == "cpu" else 1
            pinned = (threads, torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
            assert pinned == (1, True, False), f"threads, deterministic algorithms, cuDNN's benchmark: {pinned}"

    def prepare(self, model: nn.Module, ghosts: list[GhostBatchNorm2d]) -> None:
        """Put the model on the device, as the recipe's `runtime` keys say."""
        runtime = self.recipe.runtime
        self.memory_format = torch.channels_last if runtime.channels_last else torch.contiguous_format
        weights_format = self.memory_format if self.weights_may_be_channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=weights_format)
        self.ghosts = ghosts
        self.mean = torch.tensor(self.recipe.augment.mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(self.recipe.augment.std, device=self.device).view(1, 3, 1, 1)
        shades = torch.arange(256.0, device=self.device).expand(1, 3, 1, 256)
        self.shades = shades.sub(self.mean).div_(self.std).contiguous()  # what each byte of each channel becomes
        self.kernels = kernels() if self.device.type == "cpu" else None
        if runtime.activation_checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise RecipeError(f"model.name={self.recipe.model.name} has no activation checkpointing in timm")
            model.set_grad_checkpointing()
        if self.recipe.ema_decay:
            self.average = Average(model, self.recipe.ema_decay)
        if self.recipe.precision == "bf16":  # inside the model: DeepSpeed turns an autocast around it off
            model.forward = torch.autocast(self.device.type, torch.bfloat16)(model.forward)
        self.train_module = self.eval_module = self.model

    @abstractmethod
    def wrap(self, optimizer: Optimizer, plan: BatchPlan) -> None:
        """Build the engine around the model and the optimizer of its parameters."""

    def sums(self, passes: int, counts: int) -> OrderFreeSum:
        """What adds a step of `passes` passes: loss, statistics, and gradients if the engine does not exchange them."""
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad and not self.exchanges_gradients]
        statistics = sum(2 * ghost.num_features for ghost in self.ghosts)
        return OrderFreeSum(named, passes, floats=1 + statistics, counts=counts, device=self.device)

    def forward(self, images: Tensor, labels: Tensor, step: int, pass_index: int) -> Tensor:
        """The mean loss of one pass; dropout depends on (seed, step, pass) alone.

        Args:
            images: uint8 (micro_batch, 3, size, size), on any device.
            labels: int64 (micro_batch,).
        """
        torch.manual_seed(int(mix64(self.recipe.seed, Purpose.DROPOUT, step, pass_index)) >> 1)
        pixels, targets = self.pixels(images), labels.to(self.device, non_blocking=True)
        if group_size(self.recipe):
            pixels, targets = mix(pixels, targets, self.recipe, step, pass_index * len(labels))
            pixels = pixels.contiguous(memory_format=self.memory_format)
        logits = self.train_module(pixels).float()
        return F.cross_entropy(logits, targets, label_smoothing=self.recipe.augment.label_smoothing)

    def exchange(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a pass; gradients are exchanged in the last one's."""
        return nullcontext()

    def backward(self, loss: Tensor, passes: int) -> None:
        """Add the gradients of one of `passes` passes of this process to those before."""
        (loss / passes).backward()

    def bad_gradients(self) -> list[str]:
        """Names of the parameters whose whole gradient, after the last pass, is not finite."""
        named = [(n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
        if not named or not self.exchanges_gradients:  # the order-free sum finds its own
            return []
        finite = torch.stack(torch._foreach_norm([g for _, g in named], float("inf"))).isfinite().tolist()
        return [name for (name, _), fine in zip(named, finite) if not fine]

    def step(self, lr: float, number: int) -> bool:
        """The run's `number`-th update; False if the engine left it out because the gradient is not finite."""
        self.optimizer.updates = number
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        applied = self.update()
        if self.average and applied:
            self.average.update()
        return applied

    def update(self) -> bool:
        """Clip the gradient and step; False as in `step`."""
        if self.recipe.clip_norm:
            self.clip([p.grad for p in self.model.parameters() if p.grad is not None], self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def clip(self, grads: list[Tensor], limit: float) -> None:
        """Scale the whole gradient to a norm of at most `limit`."""
        norms.clip(grads, limit)

    def trust_ratios(self) -> dict[str, float]:
        """{parameter name: trust ratio in the last step}; all processes call it together, each may hold only a part."""
        applied = self.optimizer.applied_ratios()
        named = {n: applied[p] for n, p in self.model.named_parameters() if p in applied}
        return {name: float(f"{ratio:.4g}") for part in gather_object([named]) for name, ratio in part.items()}

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict with whole float32 weights; all processes call it together."""
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the weights: `momentum`, and their average if there is one."""
        return self.momentum() | (named_in_checkpoint(self.average.averages) if self.average else {})

    def load_optimizer_state(self, saved: dict[str, Tensor]) -> None:
        """The reverse of `optimizer_state`."""
        momentum, averages = parted(saved)
        self.load_momentum(momentum)
        if self.average:
            for name, tensor in averages.items():
                self.average.averages[name].copy_(tensor)

    def momentum(self) -> dict[str, Tensor]:
        """{`state_key` of the optimizer: whole tensor}; all processes call it together. Empty before the first step.

        After it a parameter that had no gradient yet has zeros, so that one that is missing is a fault.
        """
        state, key = self.optimizer.state, self.optimizer.state_key
        named = [(n, p) for n, p in self.model.named_parameters() if state and p.requires_grad]
        kinds = self.optimizer.state_tensors
        return {key(n, kind): state[p][kind] if p in state else torch.zeros_like(p) for n, p in named for kind in kinds}

    def load_momentum(self, saved: dict[str, Tensor]) -> None:
        """The reverse of `momentum`."""
        for name, p in self.model.named_parameters():
            for kind in self.optimizer.state_tensors:
                if (whole := saved.get(self.optimizer.state_key(name, kind))) is not None:
                    self.optimizer.state[p][kind] = self.like(p, whole)

    def like(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """A whole tensor as this engine keeps it for a parameter."""
        return torch.empty_like(parameter).copy_(whole)

    def logits(self, images: Tensor) -> Tensor:
        """float32 (n, num_classes) of uint8 images, in evaluation."""
        return self.eval_module(self.pixels(images)).float()

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 images (n, 3, size, size) to the device, where they are normalised, in the model's memory format."""
        fits = images.dtype == torch.uint8 and images.shape[1] == 3  # what is not the loader's goes the plain way
        if fits and self.kernels and images.is_contiguous(memory_format=torch.channels_last):
            pixels = torch.empty(images.shape, memory_format=self.memory_format)
            where = images.data_ptr(), self.shades.data_ptr(), pixels.data_ptr()
            shape = len(images), images.shape[2] * images.shape[3], self.memory_format == torch.contiguous_format
            self.kernels.lars_pixels(*where, *shape)
            return pixels
        pixels = images.to(self.device, non_blocking=True).float().sub_(self.mean).div_(self.std)
        return pixels.contiguous(memory_format=self.memory_format)

    def statistics(self) -> Tensor:
        """The batch norms' sums over the last forward's groups, one float64 vector."""
        sums = [ghost.group_sums.reshape(-1) for ghost in self.ghosts]
        return torch.cat(sums).double() if sums else torch.zeros(0, dtype=torch.float64, device=self.device)

    def update_statistics(self, means: Tensor) -> None:
        """Running averages of all batch norms from the step's mean statistics, laid out as in `statistics`."""
        if self.ghosts:
            update_running(self.ghosts, means.to(self.device, non_blocking=True))


def _assert_processes(accelerator: Accelerator, launched: int) -> None:
    """Where a launch file asks for two CPU processes in the wrong words, accelerate starts one (its issue 2741)."""
    by_accelerate = {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys()
    alone = by_accelerate and "WORLD_SIZE" not in os.environ
    if accelerator.num_processes != launched or alone:
        raise RecipeError(
            f"the launch file asked for {'several' if alone else launched} processes, accelerate has "
            f"{accelerator.num_processes}: start with launch/cpu-2.yaml or launch/gpu.yaml"
        )
