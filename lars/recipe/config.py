"""The typed recipe: one YAML file and `key=value` overrides; a typo, a wrong type or a missing key is an error.

`keys.py` says what keys there are; a recipe has to give those that have no neutral value.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf

from lars.optim.registry import Entry, optimizers
from lars.recipe import limits, pretrained, strict_yaml
from lars.recipe.keys import RENAMED, VARIABLE, Recipe, all_declared, fixing
from lars.recipe.model_file import import_model_file
from lars.recipe.refusal import RecipeError, did_you_mean, hide, one_line

_OTHER_KEY = re.compile(r"\$\{[\w.]+\}")


def load(path: str | Path, overrides: list[str]) -> Recipe:
    """Read a recipe, apply `key=value` overrides, check names, types and numbers.

    The `model.py` beside it is run first: it may bring a model, or an optimizer with keys of its own.

    Raises:
        RecipeError: one line with the remedy.
    """
    path = Path(path)
    import_model_file(path.parent)
    written, lines = strict_yaml.read(path, "recipe", Path().glob("recipes/*/*.yaml"))
    parts = [(str(path), written, lines)] + [(item, _override(item), {}) for item in overrides]
    config, known = OmegaConf.structured(Recipe), list(all_declared())
    if entry := _optimizer([part for _, part, _ in parts]):
        config.optimizer = entry.keys
    for source, part, places in parts:
        _check_references(_container(part), source, places)
        if part is written and _written_path(part).startswith("."):
            part.data.path = str((path.parent / _written_path(part)).resolve())
        with strict_yaml.explained(source, places, known, "model.kwargs"):
            config.merge_with(part)
            if source.startswith("model.kwargs="):  # an override sets, it does not add
                config.model.kwargs = part.model.kwargs
    if "${oc.env:" in (place := _written_path(config)):
        config.data.path = place.replace("${", "$ {")  # no key may resolve it, not even by way of ${data.path}
    with strict_yaml.explained(str(path), {} if overrides else lines, known, "model.kwargs"):
        remedy = ": a recipe gives every key that has no neutral value"
        recipe = cast(Recipe, strict_yaml.complete(config, path, remedy))
        flat = flatten(recipe)
    if "${oc.env:" in place:
        recipe.data.path = place
        for name, _ in VARIABLE.findall(place):
            hide(os.environ.get(name, ""), f"${{oc.env:{name}}}")
    limits.check(recipe, flat)
    recipe.run_dir = recipe.run_dir or f"runs/{recipe.name}/seed-{recipe.seed}"
    recipe.model.weights_sha256 = pretrained.content(recipe.model.kwargs, recipe.model.weights_sha256)
    return recipe


def _optimizer(parts: list[DictConfig]) -> Entry | None:
    """The optimizer that is named last; old names of keys, and keys of other optimizers, are put right in `parts`.

    A key of another optimizer is left out where it is null, as recipes for sgd used to have it, or where a later part
    names this optimizer instead of the file's own. One that nobody has registered is a RecipeError.
    """
    known, given = optimizers(), []
    for part in parts:
        written = _container(part)
        for old in RENAMED.keys() & written.keys():
            del part[old]
            part[RENAMED[old]] = written[old]
        if isinstance(keys := written.get("optimizer"), dict):
            given.append((part, keys))
    names = [keys["name"] for _, keys in given if keys.get("name") is not None]
    if not names:
        if given:
            raise RecipeError(f"the recipe lacks optimizer.name: use {' or '.join(known)}")
        return None
    name = names[-1]
    if str(name) not in known:
        remedy = f"use {' or '.join(known)}{did_you_mean(str(name), list(known))}"
        raise RecipeError(f"optimizer.name={name} is unknown: {remedy}")
    entry = known[str(name)]
    own = {one.name for one in fields(entry.keys)}
    others = {one.name for other in known.values() for one in fields(other.keys)} - own
    for part, keys in given:
        for key in sorted(others & keys.keys()):
            if keys[key] is None or keys.get("name") not in (None, name):
                del part.optimizer[key]
    return entry


def flatten(typed: Any) -> dict[str, Any]:
    """{"model.name": ..., "global_batch": ...} of a recipe; lists and `model.kwargs` are values, not further levels."""
    return one_level(_container(OmegaConf.structured(typed)))


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
    """The flat keys that all processes need alike: not where a node keeps its things, nor how fast it reads."""
    own = ("name", "run_dir", "data.path", "data.workers", "data.retry_seconds", "trackers")
    return {k: v for k, v in flatten(recipe).items() if k not in own}


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


def _container(config: DictConfig) -> dict[str, Any]:
    """Dictionaries and lists of what is written, no ${...} resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(config))


def _written_path(config: DictConfig) -> str:
    """`data.path` as it is written, no ${...} resolved; "" where there is none."""
    data = _container(config).get("data")
    path = data.get("path") if isinstance(data, dict) else None
    return path if isinstance(path, str) else ""


def _check_references(value: Any, source: str, lines: dict[str, int], key: str = "") -> None:
    """A ${...} is another key, or a variable of the environment in `data.path`: elsewhere a secret would be written."""
    inner = value.items() if isinstance(value, dict) else ()
    for name, part in inner:
        _check_references(part, source, lines, f"{key}.{name}" if key else str(name))
    for part in value if isinstance(value, list) else ():
        _check_references(part, source, lines, key)
    allowed = VARIABLE if key == "data.path" and "${oc.env:" in str(value) else _OTHER_KEY
    if isinstance(value, str) and "${" in allowed.sub("", value):
        place = f"{strict_yaml.where(source, key, lines)}: " if lines else ""
        raise RecipeError(
            f"{place}{key}={value}: an environment variable, ${{oc.env:NAME}}, may stand in data.path alone, elsewhere "
            "only another key of the recipe, as in ${model.image_size}"
        )
