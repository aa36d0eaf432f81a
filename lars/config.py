"""The typed recipe: one YAML file and `key=value` overrides; a typo, a wrong type or a missing key is an error.

Keys without a default fix the trajectory and must stand in the recipe. The others have their default here and may
change when a run is resumed.
"""
from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lars import limits, pretrained, strict_yaml
from lars.model_file import import_model_file, model_files  # noqa: F401 (where recipes' model.py look for it)
from lars.reading import flatten_run, one_level
from lars.refusal import RecipeError, did_you_mean, hide, one_line, unknown_key

_VARIABLE = re.compile(r"\$\{oc\.env:(\w+)(?:,([^{}$]*))?\}")  # with a value for where it is not set
_OTHER_KEY = re.compile(r"\$\{[\w.]+\}")


@dataclass
class Model:
    name: str = MISSING  # any timm model
    num_classes: int = MISSING
    image_size: int = MISSING  # pixels, training and evaluation
    kwargs: dict[str, Any] = MISSING  # passed to timm.create_model
    weights_sha256: str | None = None  # of the file of weights that kwargs name, filled in from it (lars/pretrained.py)


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

    @property
    def place(self) -> str:
        """Where the data lie here: `path` with its environment variables, which stand in no file and no message.

        Raises:
            RecipeError: one is not set.
        """

        def value(found: re.Match) -> str:
            name, default = found.groups()
            if name not in os.environ and default is None:
                raise RecipeError(f"data.path={self.path}: the environment variable {name} is not set")
            return os.environ.get(name, default)

        return os.path.expanduser(_VARIABLE.sub(value, self.path))


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


def load(path: str | Path, overrides: list[str]) -> Recipe:
    """Read a recipe, apply `key=value` overrides, check names, types and numbers.

    Raises:
        RecipeError: one line with the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}{did_you_mean(str(path), [str(p) for p in Path().glob('recipes/*/*.yaml')])}")
    written, lines = strict_yaml.read(path, "a recipe")
    config, parts = OmegaConf.structured(Recipe), [(str(path), written, lines)]
    for source, part, places in parts + [(item, _override(item), {}) for item in overrides]:
        _check_references(OmegaConf.to_container(part), source, places)
        if part is written and _written_path(part).startswith("."):
            part.data.path = str((path.parent / _written_path(part)).resolve())
        try:
            config.merge_with(part)
            if source.startswith("model.kwargs="):  # an override sets, it does not add
                config.model.kwargs = part.model.kwargs
        except OmegaConfBaseException as error:
            raise RecipeError(_explain(error, source, places)) from None
    if "${oc.env:" in (place := _written_path(config)):
        config.data.path = place.replace("${", "$ {")  # no key may resolve it, not even by way of ${data.path}
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise RecipeError(f"{path} lacks {', '.join(missing)}: a recipe lists every key of the trajectory")
        recipe = OmegaConf.to_object(config)
        flat = flatten(recipe)
    except (OmegaConfBaseException, RecursionError) as error:  # a ${...} that leads nowhere, a list in a list
        raise RecipeError(_explain(error, str(path), {} if overrides else lines)) from None
    if "${oc.env:" in place:
        recipe.data.path = place
        for name, _ in _VARIABLE.findall(place):
            hide(os.environ.get(name, ""), f"${{oc.env:{name}}}")
    limits.check(recipe, flat)
    recipe.run_dir = recipe.run_dir or f"runs/{recipe.name}/seed-{recipe.seed}"
    model = recipe.model
    model.weights_sha256 = pretrained.content(model.kwargs, model.weights_sha256)
    if model.weights_sha256 is None and pretrained.weights_file(model.kwargs):  # gone: what did the run begin with?
        model.weights_sha256 = flatten_run(Path(recipe.run_dir)).get("model.weights_sha256")
    return recipe


def flatten(recipe: Recipe) -> dict[str, Any]:
    """{"model.name": ..., "global_batch": ...}; lists and `model.kwargs` are values, not further levels."""
    return one_level(OmegaConf.to_container(OmegaConf.structured(recipe)))


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


def _override(item: str) -> DictConfig:
    if "=" not in item or item.startswith("-"):
        raise RecipeError(f"{item!r} is no override: write key=value, as in seed=3 or optimizer.lr=16")
    try:
        strict_yaml.key_lines(yaml.compose(item.partition("=")[2], Loader=yaml.SafeLoader), item[:40])
        return OmegaConf.from_dotlist([item])
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"cannot read {item!r}: {getattr(error, 'problem', None) or one_line(error)}") from None


def _written_path(config: DictConfig) -> str:
    """`data.path` as it is written, no ${...} resolved; "" where there is none."""
    data = OmegaConf.to_container(config).get("data")
    path = data.get("path") if isinstance(data, dict) else None
    return path if isinstance(path, str) else ""


def _check_references(value: Any, source: str, lines: dict[str, int], key: str = "") -> None:
    """A ${...} is another key, or an environment variable of `data.path`: anywhere else a secret would be written down."""
    inner = value.items() if isinstance(value, dict) else ()
    for name, part in inner:
        _check_references(part, source, lines, f"{key}.{name}" if key else str(name))
    for part in value if isinstance(value, list) else ():
        _check_references(part, source, lines, key)
    allowed = _VARIABLE if key == "data.path" and "${oc.env:" in str(value) else _OTHER_KEY
    if isinstance(value, str) and "${" in allowed.sub("", value):
        place = f"{strict_yaml.where(source, key, lines)}: " if lines else ""
        raise RecipeError(
            f"{place}{key}={value}: an environment variable, ${{oc.env:NAME}}, may stand in data.path alone, elsewhere "
            "only another key of the recipe, as in ${model.image_size}"
        )


def _explain(error: Exception, source: str, lines: dict[str, int]) -> str:
    key = str(getattr(error, "full_key", None) or "").partition("[")[0]
    known, place = list(flatten(Recipe())), strict_yaml.where(source, key, lines)
    known += dict.fromkeys(name.split(".")[0] for name in known if "." in name)
    if key and key not in known and not key.startswith(("model.kwargs", "model.weights_sha256")):
        return f"{place}: {unknown_key(key, known)}"
    return f"{place}: {key or 'value'}: {one_line(error)}"
