"""A run folder read as data: it may be damaged, or a stranger's.

Nothing in it is executed, no `${...}` in it is resolved, no link is followed, no pipe waited for, and no file is read
that is larger than a run writes. What is not of the kind that a run writes is one line that names the file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from lars.recipe.config import one_level
from lars.recipe.refusal import RecipeError, one_line, short

RECIPES = Path(__file__).parents[2] / "recipes"  # this repository's; an installed library has none
_MOST_LINES = 1 << 28  # bytes of metrics.jsonl: three times those of 450,000 steps
_MOST_RESULT, _MOST_LINE, _MOST_YAML = 1 << 20, 1 << 20, 1 << 14
_MOST_BRACKETS = 200  # PyYAML's time grows with the square of their depth: 10,000 take minutes
_LARGEST = 3.5e38  # above any number of float32

_RESULT = {
    "text": (
        *("recipe", "status", "engine", "reproducibility", "commit"),
        *("weights_sha256", "samples_hash", "source_sha256", "data_fingerprint"),
    ),
    "a count": ("steps", "images", "world_size"),
    "a number": ("epochs", "seconds", "images_per_second", "heartbeat"),
    "a percentage": ("top1", "top5"),
    "an object": ("versions", "environment"),
}
_LINES = {
    "train": {"step": "a count", "epoch": "a number", "loss": "a number", "lr": "a number", "images": "a count"},
    "eval": {"step": "a count", "epoch": "a number", "top1": "a percentage"},
    "trust": {"step": "a count", "epoch": "a number", "ratios": "numbers"},
}
_ALSO = ("images_per_second", "loss", "top5", "images", "ema_loss", "ema_top1", "ema_top5")  # numbers, of some lines


def open_regular(file: Path) -> BinaryIO | None:
    """A regular file for reading, None where there is none; its size is known then, and reading it ends.

    Raises:
        RecipeError: it is a link, a folder, a device or a pipe, or cannot be read.
    """
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise RecipeError(f"{file} cannot be read: {why}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise RecipeError(f"{file} cannot be read: it is no regular file")
    return open(handle, "rb")


def read_bytes(file: Path, most: int = _MOST_LINES) -> bytes | None:
    """The content of a regular file of at most `most` bytes, None where there is none.

    Raises:
        RecipeError: it is larger, or as in `open_regular`.
    """
    if (stream := open_regular(file)) is None:
        return None
    with stream:
        size = os.fstat(stream.fileno()).st_size
        # Python takes the memory for as many bytes as it is asked for.
        content = stream.read(size) if size <= most else None
    if content is None:
        raise RecipeError(f"{file} has more than {most:,} bytes, which no run writes")
    return content


def read_object(file: Path, remedy: str = "the run resumes from its checkpoint") -> dict[str, Any]:
    """The JSON object of a file, {} where there is none.

    Args:
        remedy: what comes of it if a damaged one is removed.

    Raises:
        RecipeError: the file is damaged.
    """
    if (content := read_bytes(file, _MOST_RESULT)) is None:
        return {}
    try:
        found = _plain(json.loads(content))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found
    except (ValueError, RecursionError) as error:  # not JSON, or not even text
        why = f"{file} is damaged ({one_line(error)})"
        raise RecipeError(f"{why}: remove it, {remedy}") from None


def read_result(run: str | Path, needed: Iterable[str] = ()) -> dict[str, Any]:
    """`result.json` of a run folder, or {} where there is none.

    A key that is there has the type that a run writes, or is null.

    Raises:
        RecipeError: the file is damaged, or lacks one of the keys that are `needed`.
    """
    file = Path(run) / "result.json"
    result = read_object(file)
    for kind, keys in _RESULT.items():
        if wrong := [key for key in keys if result.get(key) is not None and not _is(kind, result[key])]:
            told = f"{wrong[0]} is {short(repr(result[wrong[0]]))}, not {kind}"
            raise RecipeError(f"{file} is damaged ({told}): remove it, the run resumes from its checkpoint")
    if missing := [key for key in needed if result.get(key) is None]:
        raise RecipeError(f"{file} lacks {', '.join(missing)}: this is no result of a run")
    return result


def diverged(result: dict[str, Any]) -> bool:
    """Whether a run ended because its numbers were no longer finite: an outcome, not an accident."""
    return result.get("status") == "failed" and str(result.get("error", "")).startswith("FloatingPointError")


def read_lines(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, of one kind if asked; none where there is no file.

    A last line that is still being written, or that a crash cut, is left out, and so is what no run writes: a
    stranger's many small values would take up to 25 times their size in memory.

    Raises:
        RecipeError: another line is damaged.
    """
    kinds = tuple(_LINES) if kind is None else (kind,)
    lines, texts = [], (read_bytes(path) or b"").splitlines()
    for number, text in enumerate(texts, 1):
        try:
            if len(text) > _MOST_LINE:
                raise ValueError(f"it has more than {_MOST_LINE:,} bytes, which no run writes")
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            if number < len(texts):
                raise RecipeError(f"{path}, line {number} is damaged ({one_line(error)}): remove it") from None
            continue
        if why := _wrong(line):
            raise RecipeError(f"{path}, line {number} is damaged ({why}): remove it")
        if line.get("kind") in kinds:
            also = {key for key in _ALSO if isinstance(line.get(key), (int, float))}
            lines.append({key: line[key] for key in line if key in {"kind", *_LINES[line["kind"]], *also}})
    return lines


def read_config(run: Path) -> dict[str, Any]:
    """`config.yaml` of a run with the keys that it has, whatever version wrote it; {} where there is none.

    Raises:
        RecipeError: the file is damaged.
    """
    file = run / "config.yaml"
    if (content := read_bytes(file, _MOST_YAML)) is None:
        return {}
    try:
        if content.count(b"[") + content.count(b"{") > _MOST_BRACKETS:
            raise ValueError(f"it has more than {_MOST_BRACKETS} brackets")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, yaml.SafeLoader)):
            raise ValueError("it has an alias, and a few of those hold more than any memory")
        written = _plain(yaml.safe_load(content))
        if not isinstance(written, dict):
            raise ValueError("its top level must be `key: value` lines")
        return written
    except Exception as error:  # PyYAML raises whatever its parts raise
        raise RecipeError(f"{file} is damaged: {one_line(error)}") from None


def flatten_run(run: Path) -> dict[str, Any]:
    """The same as flat keys, "model.name" and so on."""
    return one_level(read_config(run))


def is_name(text: Any) -> bool:
    """Whether a text can be a recipe's name, as in demo/alexnet, which does not lead out of the recipes' folder."""
    return isinstance(text, str) and bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)+", text))


def _wrong(line: Any) -> str:
    """What is wrong with a line of metrics.jsonl, or nothing."""
    if not isinstance(line, dict):
        return "no JSON object"
    kinds = _LINES.get(kind, {}) if isinstance(kind := line.get("kind"), str) else {}
    wrong = [(key, what) for key, what in kinds.items() if not _is(what, line.get(key))]
    return f"{wrong[0][0]} is {short(repr(line.get(wrong[0][0])))}, not {wrong[0][1]}" if wrong else ""


def _is(kind: str, value: Any) -> bool:
    if kind == "text":
        return isinstance(value, str) and len(value) <= 200
    if kind == "an object":
        return isinstance(value, dict)
    if kind == "numbers":
        return isinstance(value, dict) and len(value) <= 10_000 and all(_is("a number", x) for x in value.values())
    if isinstance(value, bool) or not isinstance(value, int if kind == "a count" else (int, float)):
        return False
    if kind == "a number":  # what is not finite is one too: a loss can be
        return not _LARGEST < abs(value) < float("inf")
    return 0 <= value <= (100 if kind == "a percentage" else 2**63)


def _plain(value: Any) -> Any:
    """The same in null, bool, numbers, lists, dicts and text, without signs that command a terminal or turn a line.

    Raises:
        ValueError: a key is not text.
    """
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"the key {short(repr(odd[0]))} is no text")
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return "".join(" " if unicodedata.category(sign) in ("Cc", "Cf", "Cs") else sign for sign in str(value))
