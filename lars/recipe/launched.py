"""What the launch file asks for: how many processes, on which engine. It may change a run's speed and nothing else.

accelerate's launcher passes its file on in environment variables; they are read here, before any process group exists,
and a setting that would change the trajectory is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lars.recipe.keys import Recipe
from lars.recipe.refusal import RecipeError, did_you_mean, one_line

# DeepSpeed settings that cost or save time and memory. Everything else may change the run, so it is refused by name.
_SPEED_KEYS = (
    "zero_optimization zero_allow_untested_optimizer gradient_clipping communication_data_type "
    "wall_clock_breakdown memory_breakdown comms_logger flops_profiler dump_state steps_per_print"
).split()
_ZERO_KEYS = (
    "stage overlap_comm contiguous_gradients reduce_scatter reduce_bucket_size allgather_bucket_size "
    "allgather_partitions round_robin_gradients sub_group_size ignore_unused_parameters stage3_prefetch_bucket_size "
    "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
    "stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save"
).split()

# What a launcher tells a process; torchrun sets all six, `srun` scripts do so by hand.
_PROCESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Alone(RecipeError):
    """This process cannot meet the others, so it speaks for itself, whatever its rank."""


def uses_cpu(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process trains on the CPU: no GPU, or the launch file says so."""
    import torch

    return not torch.cuda.is_available() or environment.get("ACCELERATE_USE_CPU", "").lower() == "true"


def uses_deepspeed(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launch file asks for DeepSpeed."""
    return environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


@dataclass(frozen=True)
class Launched:
    """The launcher's wishes. `engine` is "plain" (one process, or data parallel), "zero0" ... "zero3" or "fsdp2"."""

    engine: str
    processes: int
    deepspeed: dict[str, Any] = field(default_factory=dict)  # the DeepSpeed JSON

    @classmethod
    def read(cls, recipe: Recipe, environment: Mapping[str, str] = os.environ) -> Launched:
        """From the variables that `accelerate launch` sets; without a launcher one plain process.

        Raises:
            RecipeError: the launch file asks for something that would change the run.
        """
        processes = process_count(environment)
        if environment.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
            raise RecipeError("the launch file sets mixed_precision: remove it, `precision` of the recipe decides")
        if environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
            raise RecipeError("the launch file sets dynamo_config: remove it, runtime.compile=true compiles")
        if uses_deepspeed(environment):
            config = _read_json(environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
            _check_deepspeed(config)
            launched = cls(f"zero{config['zero_optimization']['stage']}", processes, config)
        elif environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            offload = environment.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
            if environment.get("FSDP_VERSION") != "2" or offload:
                raise RecipeError("FSDP works as version 2 without offload: fsdp_version: 2, as in launch/fsdp2.yaml")
            launched = cls("fsdp2", processes)
        else:
            return cls("plain", processes)
        if recipe.runtime.compile:
            raise RecipeError(f"runtime.compile=true is for plain data parallel, not for {launched.engine}")
        return launched


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the process that speaks for all, as far as a process can know that has met no other."""
    return environment.get("RANK", "0") == "0"


def place(environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """The numbers that a launcher tells a process; none where it started a single one.

    Raises:
        Alone: it has not told all, or numbers that cannot be.
    """
    if "ACCELERATE_MIXED_PRECISION" in environment and "WORLD_SIZE" not in environment:
        # accelerate's launcher for one process leaves an address behind; the engine looks whether it meant several
        return {}
    told = [name for name in _PROCESS if environment.get(name)]
    if not told:
        return {}
    if len(told) < len(_PROCESS):
        missing = ", ".join(name for name in _PROCESS if name not in told)
        raise Alone(
            f"{', '.join(told)} set, but not {missing}: a launcher tells each process all six (DeepSpeed on several "
            "nodes needs deepspeed_multinode_launcher: standard), and one process without a launcher needs none"
        )
    words = {name: environment[name] for name in told if name != "MASTER_ADDR"}
    wrong = [name for name, word in words.items() if not word.isdecimal()]
    numbers = {name: int(word) for name, word in words.items() if not wrong}
    if wrong or not numbers["RANK"] < numbers["WORLD_SIZE"] or not numbers["LOCAL_RANK"] < numbers["LOCAL_WORLD_SIZE"]:
        wrong = wrong or ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]
        given = ", ".join(f"{name}={environment[name]}" for name in wrong)
        raise Alone(f"a launcher cannot mean {given}: these are whole numbers, and ranks count from 0")
    if not 0 < numbers["MASTER_PORT"] < 2**16:
        raise Alone(f"MASTER_PORT={numbers['MASTER_PORT']} of the launcher is no port: give one from 1 to 65535")
    return numbers


def process_count(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes the launcher has started.

    Raises:
        Alone: from `place`.
        RecipeError: it started more than this machine has GPUs.
    """
    numbers = place(environment)
    local = numbers.get("LOCAL_WORLD_SIZE", 1)
    if local > 1 and not uses_cpu(environment):
        import torch

        if local > torch.cuda.device_count():
            raise RecipeError(
                f"{local} processes on this machine share {torch.cuda.device_count()} GPUs: start as many processes as "
                "GPUs (--num_processes, NPROC=), or use launch/cpu-2.yaml"
            )
    return numbers.get("WORLD_SIZE", 1)


def cores_here() -> int:
    """Cores that this process may use: fewer than the machine has under a scheduler or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoders(cores: int, processes: int) -> int:
    """Decoding processes of each of a machine's `processes`: its share of the cores less the one that trains."""
    return min(16, max(1, cores // processes - 1))


def read_launch(file: Path) -> dict[str, Any]:
    """What an accelerate launch file says.

    Raises:
        RecipeError: it is no such file.
    """
    try:
        written = yaml.safe_load(file.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(f"launch file {file} cannot be read: {one_line(error)}") from None
    sections = ("deepspeed_config", "fsdp_config")
    if not isinstance(written, dict) or not all(isinstance(written.get(key), dict | None) for key in sections):
        raise RecipeError(f"{file} is no launch file: write one as launch/cpu-2.yaml")
    return written


def environment_of(launch_file: Path) -> dict[str, str]:
    """The variables that `accelerate launch` makes of a launch file, as far as `Launched.read` looks at them."""
    written = read_launch(launch_file)
    kind = written.get("distributed_type")
    found = {"ACCELERATE_USE_DEEPSPEED": str(kind == "DEEPSPEED"), "ACCELERATE_USE_FSDP": str(kind == "FSDP")}
    if kind == "DEEPSPEED":
        section = written.get("deepspeed_config") or {}
        found["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(section.get("deepspeed_config_file", ""))
    if kind == "FSDP":
        found["FSDP_VERSION"] = str((written.get("fsdp_config") or {}).get("fsdp_version", 1))
    return found


def _read_json(file: str | None) -> dict[str, Any]:
    if not file or file == "none":
        raise RecipeError("the launch file has no deepspeed_config_file: name a JSON there, as launch/zero2.yaml does")
    try:
        config = json.loads(Path(file).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"deepspeed_config_file {file} cannot be read from {Path.cwd().name}/: {error}") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or type(zero.get("stage")) is not int or zero["stage"] not in range(4):
        raise RecipeError(f"{file} needs zero_optimization.stage 0, 1, 2 or 3, as a number")
    return config


def _check_deepspeed(config: dict[str, Any]) -> None:
    for section, allowed in ((config, _SPEED_KEYS), (config["zero_optimization"], _ZERO_KEYS)):
        unknown = sorted(key for key in set(section) - set(allowed) if not _is_off(section[key]))
        if unknown:
            meant = did_you_mean(unknown[0], allowed)
            if unknown[0] in ("bf16", "data_types"):
                meant = ", and give precision=bf16 if you want bf16"
            raise RecipeError(
                f"DeepSpeed's {unknown[0]!r} may change the run, which the recipe alone decides: remove it from the "
                f"JSON{meant}"
            )
    if config.get("gradient_clipping") != 0:
        raise RecipeError('the DeepSpeed JSON must say "gradient_clipping": 0.0: without it accelerate clips at 1.0')
    if config.get("communication_data_type", "fp32") != "fp32":
        raise RecipeError("DeepSpeed's communication_data_type must be fp32: gradients are added in float32")


def _is_off(value: Any) -> bool:
    """A section that is there only to say that it is not used."""
    if isinstance(value, dict):
        return value.get("enabled") is False or value.get("device") == "none"
    return value in (None, False)
