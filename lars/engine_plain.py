"""The plain engine (one process, or data parallel with the order-free sum) and DDP; other engines change what they do otherwise."""
from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor, nn

from lars.batch import BatchPlan
from lars.config import Recipe, RecipeError
from lars.data.mix import group_size, mix
from lars.ghost_batchnorm import GhostBatchNorm2d
from lars.keyed import Purpose, mix64
from lars.launched import Launched, uses_cpu, uses_deepspeed
from lars.optimizer import LARS
from lars.reduction import OrderFreeSum
from lars.run import unwrapped_name


class Engine:
    """Forward and backward of a pass on this process's device, the same for every number of processes.

    In the deterministic mode (`bitwise`) each process holds the whole model and the order-free sum exchanges the
    gradient. Otherwise (`numeric`) DDP exchanges it during the last pass's backward, in floating point.

    `model` is the model itself, `called` what an engine wrapped around it.
    """

    def __init__(self, recipe: Recipe, launched: Launched) -> None:
        self.recipe, self.launched = recipe, launched
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
        ddp = launched.engine == "plain" and launched.processes > 1 and not recipe.runtime.deterministic
        self.name = "ddp" if ddp else launched.engine
        self.exchanges_itself = self.name != "plain"
        self.reproducibility = "bitwise" if self.name == "plain" and recipe.runtime.deterministic else "numeric"
        self.pin_arithmetic()

    def pin_arithmetic(self) -> None:
        """Settle what changes bits: again once the engine is built, since accelerate and engines have settings of their own."""
        tf32, deterministic = self.recipe.precision != "fp32", self.recipe.runtime.deterministic
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            if self.device.type == "cpu":
                torch.set_num_threads(1)  # the number of threads changes the bits, and launchers set it as they like
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # finds bugs, costs a memory pass per allocation

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
        # a sharded weight is cut from contiguous memory; its activations may be channels last all the same
        self.model = model.to(self.device, memory_format=self.memory_format if self.name in ("plain", "ddp") else torch.contiguous_format)
        self.ghosts = ghosts
        self.mean = torch.tensor(self.recipe.augment.mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(self.recipe.augment.std, device=self.device).view(1, 3, 1, 1)
        if runtime.activation_checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise RecipeError(f"model.name={self.recipe.model.name} has no activation checkpointing in timm")
            model.set_grad_checkpointing()
        if self.recipe.precision == "bf16":  # inside the model: DeepSpeed turns an autocast around it off
            model.forward = torch.autocast(self.device.type, torch.bfloat16)(model.forward)
        self.called = self.evaluated = self.model

    def wrap(self, optimizer: LARS, plan: BatchPlan) -> None:
        """Build the engine around the model and the optimizer of its parameters."""
        self.optimizer = optimizer
        self.called = torch.compile(self.model) if self.recipe.runtime.compile else self.model
        if self.exchanges_itself:
            self.called = self.accelerator.prepare_model(self.called)
            assert isinstance(self.called, nn.parallel.DistributedDataParallel), type(self.called)

    def sums(self, passes: int, counts: int) -> OrderFreeSum:
        """What adds a step of `passes` passes: loss and statistics, and the gradient where the engine does not exchange it."""
        named = [] if self.exchanges_itself else [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
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
        logits = self.called(pixels.contiguous(memory_format=self.memory_format)).float()
        return F.cross_entropy(logits, targets, label_smoothing=self.recipe.augment.label_smoothing)

    def exchange(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a pass: DDP exchanges in the last one's backward only."""
        return self.called.no_sync() if self.exchanges_itself and not last else nullcontext()

    def backward(self, loss: Tensor, passes: int) -> None:
        """Gradients of one of `passes` passes of this process; the order-free sum divides by their number itself."""
        (loss / passes if self.exchanges_itself else loss).backward()

    def bad_gradients(self) -> list[str]:
        """Names of the parameters whose gradient DDP summed to something not finite; the order-free sum finds its own."""
        named = [(n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None] if self.exchanges_itself else []
        if not named:
            return []
        finite = torch.stack(torch._foreach_norm([g for _, g in named], float("inf"))).isfinite().tolist()
        return [name for (name, _), fine in zip(named, finite) if not fine]

    def step(self, lr: float) -> bool:
        """One optimizer step at this rate; False if the engine left it out because the gradient is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def trust_ratios(self) -> dict[str, float]:
        """{parameter name: trust ratio in the last step}; all processes call it together, each may hold some layers only."""
        applied = self.optimizer.applied_ratios()
        named = {unwrapped_name(n): applied[p] for n, p in self.model.named_parameters() if p in applied}
        return {name: float(f"{ratio:.4g}") for part in gather_object([named]) for name, ratio in part.items()}

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict with whole float32 weights and plain names; all processes call it together."""
        return {unwrapped_name(name): tensor.detach() for name, tensor in self.model.state_dict().items()}

    def momentum(self) -> dict[str, Tensor]:
        """{parameter name: whole velocity}; all processes call it together. Empty before the first step.

        After it a parameter that had no gradient yet has the velocity 0, so that one that is missing is a fault.
        """
        state = self.optimizer.state
        named = [(unwrapped_name(n), p) for n, p in self.model.named_parameters() if state and p.requires_grad]
        return {name: state[p]["momentum_buffer"] if p in state else torch.zeros_like(p) for name, p in named}

    def load_momentum(self, momentum: dict[str, Tensor]) -> None:
        """The reverse of `momentum`."""
        for name, p in self.model.named_parameters():
            if unwrapped_name(name) in momentum:
                self.optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(momentum[unwrapped_name(name)])

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """float32 (n, num_classes) of uint8 images."""
        return model(self.pixels(images).contiguous(memory_format=self.memory_format)).float()

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 images to the device, where they are normalised."""
        return images.to(self.device, non_blocking=True).float().sub_(self.mean).div_(self.std)

    def statistics(self) -> Tensor:
        """The batch norms' sums over the last forward's groups, one float64 vector."""
        sums = [ghost.group_sums.reshape(-1) for ghost in self.ghosts]
        return torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64, device=self.device)

    def update_statistics(self, means: Tensor) -> None:
        """Running averages of all batch norms from the step's mean statistics, laid out as in `statistics`."""
        parts = means.to(self.device).split([2 * ghost.num_features for ghost in self.ghosts]) if self.ghosts else ()
        for ghost, part in zip(self.ghosts, parts):
            ghost.update_running(*part.view(2, -1))


def _assert_processes(accelerator: Accelerator, launched: int) -> None:
    """accelerate starts one process where a launch file asks for two CPU processes in the wrong words (its issue 2741)."""
    alone = "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ
    if accelerator.num_processes != launched or alone:
        raise RecipeError(
            f"the launch file asked for {'several' if alone else launched} processes, accelerate has "
            f"{accelerator.num_processes}: start with launch/cpu-2.yaml or launch/gpu.yaml"
        )
