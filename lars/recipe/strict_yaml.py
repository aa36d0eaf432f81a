"""A YAML file of a person: what is wrong with it is told with its line, and its size is bounded, expanded too."""

from __future__ import annotations

import io
from pathlib import Path
from typing import cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lars.recipe.refusal import RecipeError, one_line

_MOST_BYTES, _MOST_VALUES, _LONGEST_KEY = 1 << 20, 10_000, 1_000


def read(path: Path, what: str) -> tuple[DictConfig, dict[str, int]]:
    """The values as they are written, no ${...} resolved, and the line of each key.

    Raises:
        RecipeError: the file is not `what` ("a recipe"): the reason, and the line.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise RecipeError(f"{path} is not {what}: it has more than {_MOST_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise RecipeError(f"{path} is not {what}: its top level must be `key: value` lines")
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


def where(source: str, key: str, lines: dict[str, int]) -> str:
    """The file, and the line on which a key or what holds it stands."""
    while key and key not in lines:
        key = key.rpartition("[")[0] if key.endswith("]") else key.rpartition(".")[0]
    return f"{source}, line {lines[key]}" if key else source
