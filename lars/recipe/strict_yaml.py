"""A YAML file of a person: what is wrong with it is told with its line, and its size is bounded, expanded too."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os.path import isfile
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lars.recipe.refusal import RecipeError, did_you_mean, one_line, unknown_key

_MOST_BYTES, _MOST_VALUES, _LONGEST_KEY = 1 << 20, 10_000, 1_000


def read(path: Path, what: str, others: Iterable[Path] = ()) -> tuple[DictConfig, dict[str, int]]:
    """The values as they are written, no ${...} resolved, and the line of each key.

    Args:
        what: "recipe" or "cluster".
        others: files of that kind, one of which may have been meant.

    Raises:
        RecipeError: there is no such file, or it is not `what`: the reason, and the line.
    """
    if not isfile(path):  # a name that is too long is none, where Path.is_file would raise
        raise RecipeError(f"no {what} at {path}{did_you_mean(str(path), [str(other) for other in others])}")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise RecipeError(f"{path} is not a {what}: it has more than {_MOST_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise RecipeError(f"{path} is not a {what}: its top level must be `key: value` lines")
        lines = key_lines(root, str(path))
        return cast(DictConfig, OmegaConf.load(io.StringIO(text))), lines  # it refuses a key that stands twice
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{place} is not valid YAML: {error.problem or one_line(error)}") from None
    except RecipeError:
        raise
    except OmegaConfBaseException as error:  # a ${...} that is none
        key = str(getattr(error, "full_key", None) or "")
        raise RecipeError(f"{where(str(path), key, lines)} is not valid YAML: {key}: {one_line(error)}") from None
    except Exception as error:  # not text, not readable, or nested too deeply: unrelated classes
        raise RecipeError(f"{path} is not valid YAML: {one_line(error)}") from None


def key_lines(root: yaml.Node | None, source: str) -> dict[str, int]:
    """{"optimizer.lr": its line}. What aliases (*name) repeat counts each time, so that none makes a giant.

    Raises:
        RecipeError: too many values, or too deep.
    """
    lines: dict[str, int] = {}
    todo, seen = [("", root)], 0
    while todo:
        key, node = todo.pop()
        seen += 1
        if seen > _MOST_VALUES or len(key) > _LONGEST_KEY:
            many = f"more than {_MOST_VALUES:,} values, or nests them without end"
            raise RecipeError(f"{source} holds {many}: write fewer, without aliases")
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                inner = f"{key}.{name.value}" if key else str(name.value)
                lines[inner] = name.start_mark.line + 1
                todo.append((inner, value))
        elif isinstance(node, yaml.SequenceNode):
            todo += [(f"{key}[{number}]", value) for number, value in enumerate(node.value)]
    return lines


@contextmanager
def explained(source: str, lines: dict[str, int], known: list[str], any_below: str) -> Iterator[None]:
    """Whatever OmegaConf objects to inside is one line that names the key and its place.

    Args:
        known: the flat keys that there are; below the one that is `any_below`, every name is allowed.

    Raises:
        RecipeError: that line.
    """
    try:
        yield
    # also a ${...} that leads nowhere, a list in a list, an integer beyond all floats
    except (OmegaConfBaseException, RecursionError, OverflowError) as error:
        key = str(getattr(error, "full_key", None) or "").partition("[")[0]
        known = known + list(dict.fromkeys(name.split(".")[0] for name in known if "." in name))
        if key and key not in known and not key.startswith(any_below):
            what = unknown_key(key, known)
        elif "Incompatible value 'None'" in str(error):
            what = f"{key} may not be null"
        else:
            what = f"{key or 'value'}: {one_line(error)}"
        raise RecipeError(f"{where(source, key, lines)}: {what}") from None


def complete(config: DictConfig, path: Path, remedy: str = "") -> Any:
    """The object that the structured `config` describes.

    Raises:
        RecipeError: a key has no value.
    """
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise RecipeError(f"{path} lacks {', '.join(missing)}{remedy}")
    return OmegaConf.to_object(config)


def where(source: str, key: str, lines: dict[str, int]) -> str:
    """The file, and the line on which a key or what holds it stands."""
    while key and key not in lines:
        key = key.rpartition("[")[0] if key.endswith("]") else key.rpartition(".")[0]
    return f"{source}, line {lines[key]}" if key else source
