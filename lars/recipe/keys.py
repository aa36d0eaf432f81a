"""Every key of a recipe, one after the other: what it decides, its unit, limit, choices and neutral value.

A recipe lists the core keys, which have no neutral value, and every other key of the trajectory that is not neutral.
Free keys never change the trajectory and may change when a run is resumed. An optimizer's own keys stand in its file.
"""

from __future__ import annotations

import os
import re
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from lars.optim.key import CORE, NOT_NEGATIVE, POSITIVE, PROBABILITY, SHARE, key
from lars.optim.registry import Keys, optimizers
from lars.recipe.refusal import RecipeError

VARIABLE = re.compile(r"\$\{oc\.env:(\w+)(?:,([^{}$]*))?\}")  # with a value for where it is not set


@dataclass
class Model:
    name: str = key("any timm model")
    num_classes: int = key("width of the last layer", limit=POSITIVE)
    image_size: int = key(
        "of evaluation, and of training unless augment.sizes say otherwise", limit=POSITIVE, unit="pixels"
    )
    kwargs: dict[str, Any] = key("passed to timm.create_model", {})
    frozen: list[str] = key("beginnings of the names of parameters that are not trained", [])
    weights_sha256: str | None = key("of the file of weights that kwargs name, filled in from it", None)


@dataclass
class Data:
    train_split: str = key("name of the split", "train")
    val_split: str = key("name of the split", "validation")
    image_column: str = key("column of the images", "image")
    label_column: str = key("column of the labels", "label")
    max_bad_fraction: float = key("share of undecodable images that may be replaced", 0.0, limit=SHARE)
    path: str = key(
        'a Hub id, a folder of Parquet files or images ("./..." is relative to the recipe), or an address', free=True
    )
    revision: str | None = key("of a Hub data set: branch, tag or commit", None, free=True)
    workers: int | None = key(
        "decoding processes of each rank; null: its share of the cores less one, at most 16",
        None,
        limit=POSITIVE,
        free=True,
    )
    retry_seconds: float = key(
        "how long a read that fails is tried again; then the run saves and stops",
        300.0,
        limit=POSITIVE,
        unit="s",
        free=True,
    )

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

        return os.path.expanduser(VARIABLE.sub(value, self.path))


@dataclass
class Augment:
    crop: str = key("random_crop comes after resize and pad", choices=("random_resized_crop", "random_crop"))
    scale: list[float] = key("random_resized_crop: smallest and largest share of the area")
    ratio: list[float] = key("random_resized_crop: narrowest and widest aspect ratio", [0.75, 4 / 3])
    resize: int | None = key(
        "random_crop: the shorter side is brought to this first", None, limit=POSITIVE, unit="pixels"
    )
    sizes: list[int] = key(
        "random_resized_crop: training images grow, [160, 192]; empty: model.image_size throughout", [], unit="pixels"
    )
    size_epochs: list[float] = key("when each of sizes but the first begins, [12]", [], unit="epochs")
    pad: int = key("random_crop: zeros added on every side first", 0, limit=NOT_NEGATIVE, unit="pixels")
    flip: float = key("probability of a horizontal flip", limit=PROBABILITY)
    randaugment: str | None = key("timm's policy, as in rand-m9-mstd0.5-inc1", None)
    erase: float = key("probability of random erasing", 0.0, limit=PROBABILITY)
    mixup: float = key("alpha of mixup inside each batch-norm group", 0.0, limit=NOT_NEGATIVE)
    cutmix: float = key("alpha of cutmix; with mixup each group draws one of them", 0.0, limit=NOT_NEGATIVE)
    eval_resize: int = key(
        "evaluation: the shorter side, then the centre is cut to image_size", limit=POSITIVE, unit="pixels"
    )
    resampling: str = key(
        "how images are resized, in training and evaluation alike; mixed: OpenCV's linear and Pillow's bicubic",
        "mixed",
        choices=("mixed", "bilinear", "area", "tf1_bilinear"),
    )
    mean: list[float] = key("red, green, blue, subtracted", unit="0 ... 255")
    std: list[float] = key("red, green, blue, divided by", unit="0 ... 255")
    label_smoothing: float = key("share of the target spread over all classes", 0.0, limit=SHARE)


@dataclass
class ScheduleKeys:
    warmup_epochs: float = key("length of the warm-up", limit=NOT_NEGATIVE, unit="epochs")
    warmup_lr: float = key("the rate that warm-up begins with", 0.0, limit=NOT_NEGATIVE)
    warmup_power: float = key("1 linear, 2 quadratic", 1.0, limit=POSITIVE)
    hold_epochs: float = key(
        "how long the full rate is held before decay begins to count", 0.0, limit=NOT_NEGATIVE, unit="epochs"
    )
    shape: str = key("of the decay", "polynomial", choices=("polynomial", "cosine", "step"))
    decay_from: str = key("where decay begins to count", choices=("start", "warmup_end"))
    decay_steps: int | None = key("length of the decay; null: until the end of the run", None, limit=POSITIVE)
    power: float = key("of the polynomial decay; 1 with any other shape", limit=POSITIVE)
    milestones: list[float] = key("step: when the rate drops, counted from the start", [], unit="epochs")
    gamma: float = key("step: what the rate is multiplied by at each milestone", 0.1, limit=PROBABILITY)
    end_lr: float = key("the rate that decay ends with", 0.0, limit=NOT_NEGATIVE)


@dataclass
class Runtime:
    micro_batch: int | None = key(
        "samples of one forward; null: bn_group, else gcd(global_batch, 64)", None, limit=POSITIVE, free=True
    )
    deterministic: bool = key(
        "bitwise for every number of processes; false takes DDP's own sum, which is faster", True, free=True
    )
    portable: bool = key("on CPUs: the same bits on every x86-64 with AVX2, slower", False, free=True)
    activation_checkpointing: bool = key("less memory, one more forward", False, free=True)
    channels_last: bool = key("faster convolutions on GPUs", False, free=True)
    compile: bool = key("torch.compile", False, free=True)
    hang_seconds: float = key(
        "end the run, and name the process that is behind, when none has moved for so long",
        600.0,
        limit=POSITIVE,
        unit="s",
        free=True,
    )


@dataclass
class EvaluationKeys:
    every_epochs: int | None = key(
        "null: after every epoch, and with mllog every 4", None, limit=POSITIVE, unit="epochs", free=True
    )
    first_epoch: int | None = key(
        "null: every_epochs; MLPerf calls it the offset", None, limit=POSITIVE, unit="epochs", free=True
    )


@dataclass
class Checkpoint:
    every_steps: int | None = key("null: at every evaluation", None, limit=POSITIVE, free=True)
    keep: int = key("how many of the newest are kept", 2, limit=POSITIVE, free=True)
    keep_best: bool = key("keep the one with the highest top-1 too; the last one is what is judged", False, free=True)
    on_error: str = key("what to do when one cannot be written", "go_on", choices=("go_on", "stop"), free=True)


@dataclass
class Recipe:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    global_batch: int = key("samples of one optimizer step", limit=POSITIVE)
    bn_group: int | None = key(
        "samples that share batch-norm statistics; null where a model has no batch norm", limit=POSITIVE
    )
    optimizer: Keys = field(default_factory=Keys)  # of the class that optimizer.name has registered
    clip_norm: float | None = key("largest norm of the whole gradient; null: any", None, limit=POSITIVE)
    ema_decay: float | None = key(
        "of a moving average of the weights, which is evaluated beside them; null: none", None, limit=SHARE
    )
    schedule: ScheduleKeys = field(default_factory=ScheduleKeys)
    epochs: float = key("length of the run", limit=POSITIVE)
    seed: int = key("of weights, order, augmentation and dropout", limit=NOT_NEGATIVE)
    precision: str = key("bf16 is autocast over fp32 weights", choices=("fp32", "tf32", "bf16"))
    name: str = key("of the run, as in resnet50/mine", free=True)
    run_dir: str | None = key("null: runs/<name>/seed-<seed>", None, free=True)
    runtime: Runtime = field(default_factory=Runtime)
    max_steps: int | None = key("stop early; rates still follow the horizon of epochs", None, limit=POSITIVE, free=True)
    evaluation: EvaluationKeys = field(default_factory=EvaluationKeys)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log_samples: bool = key("write the sample ids of every step into ledger.jsonl", False, free=True)
    mllog: bool = key(
        "write MLPerf's log, and evaluate every 4 epochs as its rules do, unless evaluation.* say otherwise",
        False,
        free=True,
    )
    trackers: list[str] = key("accelerate's trackers", ["tensorboard"], free=True)


RENAMED = {"ledger": "log_samples"}
"""Old names of keys, which are still read."""


def declared(optimizer: type[Keys] | None = None, kind: type = Recipe, section: str = "") -> dict[str, Field]:
    """{"model.name": its field, ...}, with the keys of an optimizer, or with those that all optimizers have."""
    found: dict[str, Field] = {}
    types = get_type_hints(kind)
    for one in fields(kind):
        inner = types[one.name]
        inner = optimizer if optimizer and inner is Keys else inner
        if is_dataclass(inner):
            found |= declared(optimizer, inner, f"{section}{one.name}.")
        else:
            found[section + one.name] = one
    return found


def neutral(one: Field) -> Any:
    """What a recipe without the key means; `CORE` if it has to be given."""
    return one.default if one.default is not MISSING else one.default_factory()  # type: ignore[misc,operator]


def all_declared() -> dict[str, Field]:
    """The keys of all optimizers that are known."""
    found = declared()
    for entry in optimizers().values():
        found |= declared(entry.keys)
    return found


def fixing(flat: dict[str, Any]) -> dict[str, Any]:
    """Of flat keys those that fix the run; one that is not known here does, too."""
    known = declared()
    return {k: v for k, v in flat.items() if not (one := known.get(RENAMED.get(k, k))) or not one.metadata["free"]}


def completed(flat: dict[str, Any]) -> dict[str, Any]:
    """Keys of the trajectory as any version wrote them: one that is absent has its neutral value.

    Recipes for sgd used to have null for what LARS alone needs; that is the same as no such key.
    """
    known = {key: neutral(one) for key, one in all_declared().items() if not one.metadata["free"]}
    given = {key: value for key, value in flat.items() if value is not None}
    return {key: value for key, value in known.items() if value not in (CORE, None)} | given


def differing(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys of the trajectory in which two runs differ."""
    then, now = completed(then), completed(now)
    return [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
