"""The typed recipe: one YAML file and `key=value` overrides; a typo, a wrong type or a missing key is an error.

Keys without a default fix the trajectory and must stand in the recipe. The others have their default here and may
change when a run is resumed.
"""
from __future__ import annotations

import difflib
import importlib.util
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class RecipeError(ValueError):
    """Bad recipe, data or environment: one line that names the remedy; the exit status is 2."""


@dataclass
class Model:
    name: str = MISSING  # any timm model
    num_classes: int = MISSING
    image_size: int = MISSING  # pixels, training and evaluation
    kwargs: dict[str, Any] = MISSING  # passed to timm.create_model


@dataclass
class Data:
    train_split: str = MISSING
    val_split: str = MISSING
    image_column: str = MISSING
    label_column: str = MISSING
    max_bad_fraction: float = MISSING  # undecodable images allowed, as a share of those read; they are replaced
    path: str = MISSING  # a Hub id, a folder ("./..." is relative to the recipe), or the address of one (https://, s3://, ...)
    revision: str | None = None  # of a Hub data set: branch, tag or commit
    workers: int | None = None  # decoding processes of each rank; null: its share of the cores less one, at most 16
    retry_seconds: float = 300.0  # how long a read that fails is tried again; then the run saves and stops


@dataclass
class Augment:
    crop: str = MISSING  # random_resized_crop, or random_crop (after `resize` and `pad`)
    scale: list[float] = MISSING  # random_resized_crop: smallest and largest share of the area
    ratio: list[float] = MISSING  # random_resized_crop: narrowest and widest aspect ratio
    resize: int | None = MISSING  # random_crop: the shorter side is brought to this first; null leaves the image
    pad: int = MISSING  # random_crop: zero pixels added on every side first
    flip: float = MISSING  # probability of a horizontal flip
    randaugment: str | None = MISSING  # timm's policy, as in rand-m9-mstd0.5-inc1; null: none
    erase: float = MISSING  # probability of random erasing
    mixup: float = MISSING  # alpha of mixup inside each batch-norm group; 0: none
    cutmix: float = MISSING  # alpha of cutmix, likewise; with both each group draws one of them
    eval_resize: int = MISSING  # evaluation: the shorter side, then the centre image_size is cut
    mean: list[float] = MISSING  # subtracted from 0 ... 255
    std: list[float] = MISSING  # divided by
    label_smoothing: float = MISSING


@dataclass
class Optimizer:
    name: str = MISSING  # lars or sgd
    lr: float = MISSING  # the rate after warm-up
    momentum: float = MISSING
    weight_decay: float = MISSING  # tensors with more than one dimension
    trust_coefficient: float | None = MISSING  # null for sgd
    eps: float | None = MISSING  # null for sgd
    momentum_mode: str = MISSING  # paper (rate inside the velocity) or torch (outside)
    decay_in_norm: bool | None = MISSING  # false: the ratio without weight decay, as nvcaffe has it; null for sgd
    adapt_1d: bool | None = MISSING  # true: biases and norm scales are adapted and decayed too; null for sgd


@dataclass
class ScheduleKeys:
    warmup_epochs: float = MISSING
    warmup_lr: float = MISSING
    warmup_power: float = MISSING  # 1 linear, 2 quadratic
    decay_from: str = MISSING  # start or warmup_end
    decay_steps: int | None = MISSING  # null: until the end of the run
    power: float = MISSING
    end_lr: float = MISSING


@dataclass
class Runtime:
    micro_batch: int | None = None  # samples of one forward; null: bn_group, else gcd(global_batch, 64)
    deterministic: bool = True  # bitwise for every number of processes; false takes DDP's own sum, faster
    portable: bool = False  # on CPUs: the same bits on every x86-64 with AVX2, at the price of slower matrix products
    activation_checkpointing: bool = False  # less memory, one more forward
    channels_last: bool = False  # faster convolutions on GPUs
    compile: bool = False  # torch.compile
    hang_seconds: float = 600.0  # end the run, and name the process that is behind, when none has moved for so long


@dataclass
class Checkpoint:
    every_steps: int | None = None  # null: at every evaluation
    keep: int = 2  # newest checkpoints kept
    on_error: str = "go_on"  # go_on (with a warning) or stop, when one cannot be written


@dataclass
class Recipe:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    global_batch: int = MISSING
    bn_group: int | None = MISSING  # samples that share batch-norm statistics; null where a model has no batch norm
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: ScheduleKeys = field(default_factory=ScheduleKeys)
    epochs: float = MISSING
    seed: int = MISSING
    precision: str = MISSING  # fp32, tf32 or bf16 (autocast over fp32 weights)
    name: str = MISSING
    run_dir: str | None = None  # null: runs/<name>/seed-<seed>
    runtime: Runtime = field(default_factory=Runtime)
    max_steps: int | None = None  # stop early; rates still follow the horizon of `epochs`
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    ledger: bool = False  # write the sample ids of every step
    mllog: bool = False  # write MLPerf's log, and evaluate every 4 epochs as its rules do
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])  # accelerate's trackers


FREE_KEYS = ("name", "run_dir", "data.path", "data.revision", "data.workers", "data.retry_seconds", "runtime", "max_steps", "checkpoint", "ledger", "mllog", "trackers")
"""Keys that never change the trajectory; every other key is compared when a run is resumed."""

_CHOICES = {
    "augment.crop": ("random_resized_crop", "random_crop"),
    "optimizer.name": ("lars", "sgd"),
    "optimizer.momentum_mode": ("paper", "torch"),
    "schedule.decay_from": ("start", "warmup_end"),
    "precision": ("fp32", "tf32", "bf16"),
    "checkpoint.on_error": ("go_on", "stop"),
}

_POSITIVE, _NOT_NEGATIVE, _SHARE = "must be positive", "must not be negative", "must lie in [0, 1)"
_LIMITS = {
    "model.num_classes": _POSITIVE,
    "model.image_size": _POSITIVE,
    "data.max_bad_fraction": _SHARE,
    "data.workers": _POSITIVE,
    "data.retry_seconds": _POSITIVE,
    "augment.resize": _POSITIVE,
    "augment.pad": _NOT_NEGATIVE,
    "augment.flip": "must lie in [0, 1]",
    "augment.erase": "must lie in [0, 1]",
    "augment.mixup": _NOT_NEGATIVE,
    "augment.cutmix": _NOT_NEGATIVE,
    "augment.eval_resize": _POSITIVE,
    "augment.label_smoothing": _SHARE,
    "global_batch": _POSITIVE,
    "bn_group": _POSITIVE,
    "optimizer.lr": _POSITIVE,
    "optimizer.momentum": _SHARE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.trust_coefficient": _POSITIVE,
    "optimizer.eps": _NOT_NEGATIVE,
    "schedule.warmup_epochs": _NOT_NEGATIVE,
    "schedule.warmup_lr": _NOT_NEGATIVE,
    "schedule.warmup_power": _POSITIVE,
    "schedule.decay_steps": _POSITIVE,
    "schedule.power": _POSITIVE,
    "schedule.end_lr": _NOT_NEGATIVE,
    "epochs": _POSITIVE,
    "seed": _NOT_NEGATIVE,
    "runtime.micro_batch": _POSITIVE,
    "runtime.hang_seconds": _POSITIVE,
    "max_steps": _POSITIVE,
    "checkpoint.every_steps": _POSITIVE,
    "checkpoint.keep": _POSITIVE,
}
_HOLDS = {
    _POSITIVE: lambda x: x > 0,
    _NOT_NEGATIVE: lambda x: x >= 0,
    _SHARE: lambda x: 0 <= x < 1,
    "must lie in [0, 1]": lambda x: 0 <= x <= 1,
}


model_files: dict[Path, list[Path]] = {}  # each `model.py` that was run, and those that it ran in turn: a run's sources
_running: list[Path] = []


def load(path: str | Path, overrides: list[str]) -> Recipe:
    """Read a recipe, apply `key=value` overrides, check names, types and numbers.

    Raises:
        RecipeError: one line with the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}{did_you_mean(str(path), [str(p) for p in Path().glob('recipes/*/*.yaml')])}")
    try:
        written = OmegaConf.load(path)
    except Exception as error:  # PyYAML and OmegaConf raise unrelated classes for the same mistake
        raise RecipeError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(written, DictConfig):
        raise RecipeError(f"{path} is not a recipe: its top level must be `key: value` lines")
    relative = OmegaConf.select(written, "data.path", default=None)
    if isinstance(relative, str) and relative.startswith("."):
        written.data.path = str((path.parent / relative).resolve())
    config = OmegaConf.structured(Recipe)
    for source, part in [(str(path), written), *((item, _override(item)) for item in overrides)]:
        try:
            config.merge_with(part)
        except OmegaConfBaseException as error:
            raise RecipeError(_explain(error, source)) from None
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise RecipeError(f"{path} lacks {', '.join(missing)}: a recipe lists every key of the trajectory")
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # a ${...} that leads nowhere
        raise RecipeError(_explain(error, str(path))) from None
    recipe.run_dir = recipe.run_dir or f"runs/{recipe.name}/seed-{recipe.seed}"
    _check(recipe, flatten(recipe))
    return recipe


def flatten(recipe: Recipe) -> dict[str, Any]:
    """{"model.name": ..., "global_batch": ...}; lists and `model.kwargs` are values, not further levels."""
    return one_level(OmegaConf.to_container(OmegaConf.structured(recipe)))


def one_level(nested: dict[str, Any]) -> dict[str, Any]:
    """{"model.name": ...} of {"model": {"name": ...}}; what lies deeper is a value."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": inner_value for inner, inner_value in value.items()})
        else:
            flat[key] = value
    return flat


def trajectory(recipe: Recipe) -> dict[str, Any]:
    """The flat keys that fix the run."""
    return fixing(flatten(recipe))


def shared(recipe: Recipe) -> dict[str, Any]:
    """The flat keys that all processes need alike: all but those that say where a node keeps its things, and how fast it reads."""
    own = ("name", "run_dir", "data.path", "data.workers", "data.retry_seconds", "trackers")
    return {k: v for k, v in flatten(recipe).items() if k not in own}


def fixing(flat: dict[str, Any]) -> dict[str, Any]:
    """Of flat keys those that fix the run."""
    return {k: v for k, v in flat.items() if k not in FREE_KEYS and k.split(".")[0] not in FREE_KEYS}


def import_model_file(folder: Path) -> None:
    """Run the `model.py` in a recipe's folder, if there is one, so that it registers its models with timm."""
    file = (Path(folder) / "model.py").resolve()
    for outer in _running:
        model_files[outer].append(file)
    if file.is_file() and file not in model_files:
        model_files[file] = []
        spec = importlib.util.spec_from_file_location(f"recipe_model_{len(model_files)}", file)
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        _running.append(file)
        spec.loader.exec_module(sys.modules[spec.name])
        _running.pop()


def _override(item: str) -> DictConfig:
    if "=" not in item or item.startswith("-"):
        raise RecipeError(f"{item!r} is no override: write key=value, as in seed=3 or optimizer.lr=16")
    try:
        return OmegaConf.from_dotlist([item])
    except Exception as error:
        raise RecipeError(f"cannot read {item!r}: {one_line(error)}") from None


def _explain(error: OmegaConfBaseException, source: str) -> str:
    key = str(getattr(error, "full_key", None) or "")
    known = list(flatten(Recipe()))
    if key and key not in known and not key.startswith("model.kwargs"):
        return f"{source}: unknown key {key!r}{did_you_mean(key, [*known, *{k.split('.')[0] for k in known}])}"
    return f"{source}: {key or 'value'}: {one_line(error)}"


def _check(recipe: Recipe, flat: dict[str, Any]) -> None:
    for key, allowed in _CHOICES.items():
        if flat[key] not in allowed:
            raise RecipeError(f"{key}={flat[key]} is unknown: use {' or '.join(allowed)}{did_you_mean(flat[key], allowed)}")
    for key, value in flat.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise RecipeError(f"{key}={value} is not finite")
    for key, limit in _LIMITS.items():
        if flat[key] is not None and not _HOLDS[limit](flat[key]):
            raise RecipeError(f"{key}={flat[key]} {limit}")
    for key in ("scale", "ratio"):
        value = flat[f"augment.{key}"]
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            raise RecipeError(f"augment.{key}={value} must be two positive numbers, smaller first")
    if recipe.augment.scale[1] > 1:
        raise RecipeError(f"augment.scale={recipe.augment.scale}: a crop has at most the area of its image, 1.0")
    if len(recipe.augment.mean) != 3 or len(recipe.augment.std) != 3 or min(recipe.augment.std) <= 0:
        raise RecipeError("augment.mean and augment.std must be three numbers each (red, green, blue in 0 ... 255), std positive")
    if recipe.augment.eval_resize < recipe.model.image_size:
        raise RecipeError(
            f"augment.eval_resize={recipe.augment.eval_resize} is smaller than model.image_size={recipe.model.image_size}"
        )
    if recipe.augment.randaugment is not None and not recipe.augment.randaugment.startswith("rand"):
        raise RecipeError(f"augment.randaugment={recipe.augment.randaugment} is no policy of timm: write it as in rand-m9-mstd0.5-inc1")
    if recipe.data.retry_seconds >= recipe.runtime.hang_seconds:
        raise RecipeError(
            f"data.retry_seconds={recipe.data.retry_seconds:g} must be below runtime.hang_seconds={recipe.runtime.hang_seconds:g}, "
            "or the run would be ended as hanging first"
        )
    if recipe.runtime.portable and recipe.runtime.compile:
        raise RecipeError(
            "runtime.compile=true makes kernels for this CPU, which runtime.portable=true excludes: set one of them to false"
        )
    if recipe.seed >= 2**63:
        raise RecipeError(f"seed={recipe.seed} does not fit 63 bits")
    if recipe.schedule.warmup_epochs >= recipe.epochs:
        raise RecipeError(f"schedule.warmup_epochs={recipe.schedule.warmup_epochs:g} must be below epochs={recipe.epochs:g}")
    if recipe.optimizer.name == "lars" and None in (recipe.optimizer.trust_coefficient, recipe.optimizer.eps):
        raise RecipeError("optimizer.name=lars needs numbers for optimizer.trust_coefficient and optimizer.eps (0.001 and 0.0)")
    if recipe.optimizer.name == "lars" and None in (recipe.optimizer.decay_in_norm, recipe.optimizer.adapt_1d):
        raise RecipeError("optimizer.name=lars needs true or false for optimizer.decay_in_norm and optimizer.adapt_1d (true and false)")


def did_you_mean(word: str, known: list[str] | tuple[str, ...]) -> str:
    """"; did you mean ...?" with the nearest known word, or nothing."""
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
