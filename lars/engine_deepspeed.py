"""DeepSpeed ZeRO 0 to 3, with LARS as the optimizer inside it."""
from __future__ import annotations

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lars.batch import BatchPlan
from lars.config import Recipe
from lars.engine_plain import Engine
from lars.launched import Launched
from lars.optimizer import LARS
from lars.run import unwrapped_name

_OPTIMIZERS = {0: "LARS", 1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}


class DeepSpeed(Engine):
    """A pass is one micro-step of DeepSpeed, which divides the loss, adds passes in float32 and averages over processes."""

    def __init__(self, recipe: Recipe, launched: Launched) -> None:
        # it warns of every optimizer that is not its own; this one is tested on each stage
        logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of DeepSpeed's calls, not of ours
        super().__init__(recipe, launched)
        self.stage = launched.deepspeed["zero_optimization"]["stage"]

    def wrap(self, optimizer: LARS, plan: BatchPlan) -> None:
        """`accelerator.prepare` makes the engine; what it is and how it counts batches is asserted."""
        config = self.accelerator.deepspeed_plugin.deepspeed_config
        # its bf16 section rounds the weights first and makes float32 masters of what is left
        self.whole = {p: p.detach().clone() for p in self.model.parameters()} if config.get("bf16", {}).get("enabled") else {}
        config["train_micro_batch_size_per_gpu"] = plan.micro_batch
        config["gradient_accumulation_steps"] = self.accelerator.gradient_accumulation_steps = plan.passes_per_process
        self.called, _ = self.accelerator.prepare(self.model, optimizer)
        self.evaluated, self.optimizer, engine = self.called, optimizer, self.called
        built = (engine.zero_optimization_stage(), type(engine.optimizer).__name__, engine.gradient_clipping())
        low_precision = engine.bfloat16_enabled()
        wanted = "BF16_Optimizer" if low_precision and self.stage == 1 else _OPTIMIZERS[self.stage]
        assert built == (self.stage, wanted, 0.0), built
        assert low_precision or engine.optimizer is optimizer or engine.optimizer.optimizer is optimizer
        batches = (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps())
        assert batches == (plan.global_batch, plan.micro_batch, plan.passes_per_process), batches

    def exchange(self, last: bool) -> AbstractContextManager:
        """Tell DeepSpeed which pass ends the step."""
        self.called.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor, passes: int) -> None:
        """DeepSpeed divides by the number of passes itself."""
        self.called.backward(loss)

    def bad_gradients(self) -> list[str]:
        """Stage 0 has whole gradients; the sharded stages look at the norm of all in `step` and leave the step out."""
        return super().bad_gradients() if self.stage == 0 else []

    def step(self, lr: float) -> bool:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.called.step()
        if self.stage == 3:  # where a layer had no gradient in a step, the next one would find the last one's here
            self.called.optimizer.grad_partitions_flat_buffer.zero_()
        return self.called.was_step_applied()

    def weights(self) -> dict[str, Tensor]:
        """From the float32 masters where the model itself has slices (stage 3) or bf16 copies."""
        state = self.model.state_dict(keep_vars=True)
        masters: dict[Tensor, Tensor] = {}
        if self.called.bfloat16_enabled():
            masters = dict(self.optimizer.layout.gather(lambda tensor: tensor.detach()))
        elif self.stage == 3:
            masters = dict(self._gathered())
        whole = {}
        for name, tensor in state.items():
            shape = getattr(tensor, "ds_shape", tensor.shape)
            whole[unwrapped_name(name)] = masters[tensor].view(shape) if tensor in masters else tensor.detach()
        return whole

    def _gathered(self) -> list[tuple[Tensor, Tensor]]:
        """Whole copies of stage 3's weights, frozen ones too."""
        from deepspeed import zero

        copies = []
        for p in self.model.parameters():
            with zero.GatheredParameters([p]):
                copies.append((p, p.detach().clone()))
        return copies

    def momentum(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return super().momentum()
        if not any(self.optimizer.state.values()):
            return {}
        names = {p: unwrapped_name(name) for name, p in self.model.named_parameters()}
        velocities = self.optimizer.layout.gather(lambda tensor: self.optimizer.state[tensor]["momentum_buffer"])
        return {names[p]: velocity.view(getattr(p, "ds_shape", p.shape)) for p, velocity in velocities}

    def load_momentum(self, momentum: dict[str, Tensor]) -> None:
        state, layout = self.optimizer.state, self.optimizer.layout
        if self.whole:
            layout.scatter(self.whole.get, lambda tensor: tensor.detach())
            self.whole = {}
        if self.stage == 0 or not momentum:
            return super().load_momentum(momentum)
        names = {p: unwrapped_name(name) for name, p in self.model.named_parameters()}
        for tensor in layout.pieces:
            state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)
        layout.scatter(lambda p: momentum.get(names[p]), lambda tensor: state[tensor]["momentum_buffer"])
