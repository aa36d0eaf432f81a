"""What a user is told when something is refused: one line, the nearest valid word, no value that is to stay hidden."""

from __future__ import annotations

import difflib
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any

_SHORTEST = 4  # characters of a value that is hidden; a shorter one would hide half of every message

_names: dict[str, str] = {}  # value of an environment variable -> what a recipe writes for it


class RecipeError(ValueError):
    """Bad recipe, data or environment: one line that names the remedy; the exit status is 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


def refuses(*kinds: type[Exception]) -> Callable:
    """Decorator of a command's main: an error of these kinds is one line on stderr, and the exit status 2."""

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @wraps(main)
        def told(*arguments) -> int:
            try:
                return main(*arguments)
            except kinds as error:
                print(f"error: {printable(str(error))}", file=sys.stderr)
                return 2

        return told

    return decorate


def hide(value: str, written: str) -> None:
    """From now on this process and those that it forks say `written` in messages and logs where `value` would stand."""
    if len(value) < _SHORTEST or value in _names:
        return
    if not _names:
        make = logging.getLogRecordFactory()

        def without_values(*args, **kwargs) -> logging.LogRecord:
            record = make(*args, **kwargs)
            with suppress(Exception):  # arguments that do not fit: `logging` complains of them itself
                record.msg, record.args = hidden(record.getMessage()), None
            return record

        logging.setLogRecordFactory(without_values)  # libraries' records too
        sys.excepthook = lambda *error: sys.stderr.write(hidden("".join(traceback.format_exception(*error))))
    _names[value] = written


def hidden(text: str) -> str:
    """The text without the values that `hide` was given, the longest first."""
    for value in sorted(_names, key=len, reverse=True):
        text = text.replace(value, _names[value])
    return text


def printable(text: str) -> str:
    """In one line, whatever a file or a class is called, without values that stay hidden."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in hidden(text))


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """ "; did you mean ...?" with the nearest known word, or nothing where none is near."""
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.75)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown_key(key: str, known: Sequence[str]) -> str:
    """What to say of a key that is not there: the nearest ones (of `lr`: `optimizer.lr`), else those of its section."""
    section, _, last = key.rpartition(".")
    near = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in known], n=1, cutoff=0.75)
    names = [name for name in known if name.rpartition(".")[2] in near]
    names = [name for name in names if name.rpartition(".")[0] == section] or names
    if names:
        return f"unknown key {key!r}; did you mean {' or '.join(map(repr, names))}?"
    there = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    return f"unknown key {key!r}; {section or 'the top level'} has {', '.join(there)}"


def one_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def short(value: Any) -> str:
    """A value as a message has room for it: of a hash as much as tells it from another."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
