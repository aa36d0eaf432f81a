"""DeepSpeed ZeRO 0 to 3, with the recipe's optimizer inside it."""

from __future__ import annotations

import logging
import warnings
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lars.engine.base import Engine
from lars.optim.base import Optimizer
from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe
from lars.recipe.launched import Launched

_OPTIMIZERS = {1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}


class DeepSpeed(Engine):
    """A pass is a micro-step of DeepSpeed, which divides the loss, adds in float32 and averages over processes."""

    def __init__(self, recipe: Recipe, launched: Launched) -> None:
        # it warns of every optimizer that is not its own; this one is tested on each stage
        logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of DeepSpeed's calls, not of ours
        super().__init__(recipe, launched)
        self.stage = launched.deepspeed["zero_optimization"]["stage"]

    def wrap(self, optimizer: Optimizer, plan: BatchPlan) -> None:
        """`accelerator.prepare` makes the engine; what it is and how it counts batches is asserted."""
        config = self.accelerator.deepspeed_plugin.deepspeed_config
        config["gradient_clipping"] = clip_norm = self.recipe.clip_norm or 0.0
        config["train_micro_batch_size_per_gpu"] = plan.micro_batch
        config["gradient_accumulation_steps"] = self.accelerator.gradient_accumulation_steps = plan.passes_per_process
        self.train_module, _ = self.accelerator.prepare(self.model, optimizer)
        self.eval_module, self.optimizer, engine = self.train_module, optimizer, self.train_module
        built = (engine.zero_optimization_stage(), type(engine.optimizer).__name__, engine.gradient_clipping())
        assert built == (self.stage, _OPTIMIZERS.get(self.stage, type(optimizer).__name__), clip_norm), built
        assert engine.optimizer is optimizer or engine.optimizer.optimizer is optimizer
        passes = engine.gradient_accumulation_steps()
        batches = (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(), passes)
        assert batches == (plan.global_batch, plan.micro_batch, plan.passes_per_process), batches

    def exchange(self, last: bool) -> AbstractContextManager:
        """Tell DeepSpeed which pass ends the step."""
        self.train_module.set_gradient_accumulation_boundary(last)
        return super().exchange(last)

    def backward(self, loss: Tensor, passes: int) -> None:
        """DeepSpeed divides by the number of passes itself."""
        self.train_module.backward(loss)

    def bad_gradients(self) -> list[str]:
        """Stage 0 has whole gradients; the sharded stages look at the norm of all in `update`, and leave it out."""
        return super().bad_gradients() if self.stage == 0 else []

    def update(self) -> bool:
        """DeepSpeed clips the gradient itself."""
        self.train_module.step()
        if self.stage == 3:  # where a layer had no gradient in a step, the next one would find the last one's here
            self.train_module.optimizer.grad_partitions_flat_buffer.zero_()
        return self.train_module.was_step_applied()

    def weights(self) -> dict[str, Tensor]:
        """On stage 3 the model itself has slices, of frozen weights too; buffers are whole."""
        if self.stage < 3:
            return super().weights()
        from deepspeed import zero

        whole = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            with zero.GatheredParameters([tensor]):
                whole[name] = tensor.detach().clone()
        return whole

    def momentum(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return super().momentum()
        state, whole = self.optimizer.state, {}
        if not any(state.values()):
            return {}
        names = {p: name for name, p in self.model.named_parameters()}
        for kind in self.optimizer.state_tensors:
            for p, flat in self.optimizer.layout.gather(lambda tensor, kind=kind: state[tensor][kind]):
                whole[self.optimizer.state_key(names[p], kind)] = flat.view(getattr(p, "ds_shape", p.shape))
        return whole

    def load_momentum(self, saved: dict[str, Tensor]) -> None:
        state, layout, key = self.optimizer.state, self.optimizer.layout, self.optimizer.state_key
        if self.stage == 0 or not saved:
            return super().load_momentum(saved)
        names = {p: name for name, p in self.model.named_parameters()}
        for kind in self.optimizer.state_tensors:
            for tensor in layout.pieces:
                state[tensor][kind] = torch.zeros_like(tensor)
            layout.scatter(
                lambda p, kind=kind: saved.get(key(names[p], kind)), lambda tensor, kind=kind: state[tensor][kind]
            )
