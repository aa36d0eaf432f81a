"""Checkpoints that any engine and any number of processes can load: whole float32 tensors and a few numbers.

A checkpoint is a folder `checkpoints/step-<n>` with `model.safetensors` (weights and batch-norm statistics),
`momentum.safetensors` (by parameter name; a weight with two names stands there once), `state.json`, which has the
SHA-256 of both, and `state.sha256`, which has that of `state.json`. It is written beside its place, synced and
renamed, so that one that has its name is whole unless the disk itself lost something, which the hashes show. `latest`
names the newest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from safetensors.torch import load_file
from torch import Tensor, nn

from lars.recipe.config import trajectory
from lars.recipe.keys import Recipe, differing
from lars.recipe.refusal import RecipeError, one_line
from lars.run.reading import open_regular, read_bytes

log = logging.getLogger(__name__)

FILES = ("model.safetensors", "momentum.safetensors")
_MOST_STATE = 1 << 24  # bytes: half a million row groups; as objects many small values are 25 times as much


@dataclass
class State:
    """What a run is beside its tensors."""

    step: int
    samples_hash: int
    bad_images: int
    seconds: float
    evaluation: dict[str, float]  # step, top1, top5 of the last one; empty before the first
    data_fingerprint: str
    trajectory: dict[str, Any]
    aliases: dict[str, str] = field(default_factory=dict)  # second name of a tied weight -> the first one
    files: dict[str, str] = field(default_factory=dict)  # file -> SHA-256
    made: dict[str, Any] = field(default_factory=dict)  # `reproducibility` so far, and the numeric `environment`
    content: list[str] = field(default_factory=list)  # of both splits: hashes of the row groups that were read so far
    format: int = 1  # since 2 there is always a state.sha256, and a velocity for every trained tensor


def saved(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8,18}", path.name))


def top1_of(checkpoint: Path) -> float:
    """What its own weights reached; -1 for one that was saved between two evaluations, or is damaged."""
    try:
        state = _state(checkpoint)
    except (OSError, ValueError):
        return -1.0
    return state.evaluation["top1"] if state.evaluation.get("step") == state.step else -1.0


class Claim(NamedTuple):
    """A checkpoint as its name and its `state.json` have it; its files have not been compared with their hashes yet."""

    step: int
    digest: str  # of all that decides how the run goes on from it, so not of the time that it took
    path: Path


def claims(run: Path) -> list[Claim]:
    """What the run folder holds, oldest first."""
    found = []
    for checkpoint in saved(run):
        try:
            state = _state(checkpoint)
            decides = (state.files, state.samples_hash, state.bad_images, state.data_fingerprint, state.trajectory)
            digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
            found.append(Claim(state.step, digest, checkpoint))
        except (OSError, ValueError) as error:
            log.warning("%s is damaged (%s): falling back to the one before", checkpoint, error)
    return found


def verified(checkpoint: Path) -> State | None:
    """The state of a checkpoint whose files are what was written; None, with a warning, for a damaged one."""
    if why := damage(checkpoint):
        log.warning("%s is damaged (%s): falling back to the one before", checkpoint, why)
        return None
    return _state(checkpoint)


def damage(checkpoint: Path) -> str:
    """In what a checkpoint is not what was written; empty if it is."""
    try:
        state, written = _state(checkpoint), read_bytes(checkpoint / "state.sha256", 1 << 10)
        if written is None and state.format > 1:
            return "state.sha256 is gone"
        if written is not None and written.decode().strip() != sha256(checkpoint / "state.json"):
            return "state.json is not what was written"
        other = [name for name, digest in state.files.items() if sha256(checkpoint / name) != digest]
        return f"{other[0]} is not what was written" if other else ""
    except (OSError, ValueError) as error:
        return str(error)


def _state(checkpoint: Path) -> State:
    """What `state.json` says; ValueError if it is not what a run writes."""
    try:
        state = State(**json.loads(read_bytes(checkpoint / "state.json", _MOST_STATE) or b""))
        wrong = [name for name, kind in get_type_hints(State).items() if not _is(getattr(state, name), kind)]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"state.json: {one_line(error)}") from None
    if wrong:
        raise ValueError(f"state.json: {wrong[0]} is of another type")
    if state.step != int(checkpoint.name.removeprefix("step-")):
        raise ValueError(f"state.json is of step {state.step}")
    if set(state.files) != set(FILES):
        raise ValueError(f"state.json does not list {' and '.join(FILES)}")
    batch, whole = state.trajectory.get("global_batch"), set(state.evaluation) in (set(), {"step", "top1", "top5"})
    counted = not isinstance(batch, int) or 0 <= state.bad_images <= state.step * batch
    if not whole or not counted or not isinstance(state.made.get("environment", {}), dict):
        raise ValueError("state.json: bad_images, evaluation or made is not what a run writes")
    return state


def _is(value: Any, kind: Any) -> bool:
    """Whether a value from JSON has a field's type: int, float, str, list or dict[str, ...]."""
    if kind is Any:
        return True
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else get_origin(kind) or kind):
        return False
    return not isinstance(value, dict) or all(_is(inner, get_args(kind)[1]) for inner in value.values())


def read(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """{name: tensor} of weights and statistics, and {parameter name: whole velocity}."""
    return load_file(checkpoint / FILES[0]), load_file(checkpoint / FILES[1])


def load_weights(tensors: dict[str, Tensor], state: State, model: nn.Module) -> None:
    """Bring weights and statistics back into a plain model, in place."""
    model.load_state_dict(tensors | {name: tensors[first] for name, first in state.aliases.items()})


def aliases(model: nn.Module) -> dict[str, str]:
    """{name: an earlier name of the same tensor} in a plain model's state dict."""
    first: dict[Tensor, str] = {}
    named = model.state_dict(keep_vars=True).items()
    return {name: first[tensor] for name, tensor in named if first.setdefault(tensor, name) != name}


def check_same_run(then: dict[str, Any], recipe: Recipe, data_fingerprint: str) -> None:
    """A resume must not change what the run is.

    Args:
        then: the trajectory of the run in the folder, and its "data fingerprint".

    Raises:
        RecipeError: names every difference and the way to start another run.
    """
    now = json.loads(json.dumps(trajectory(recipe) | {"data fingerprint": data_fingerprint}))
    changed = differing(then, now)
    if changed:
        told = "; ".join(f"{key}: {str(then.get(key))[:40]} -> {str(now.get(key))[:40]}" for key in changed)
        raise RecipeError(f"{recipe.run_dir} holds another run ({told}): give this one its own run_dir=...")


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def sha256(file: Path) -> str:
    if (stream := open_regular(file)) is None:
        raise FileNotFoundError(f"{file.name} is gone")
    with stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
