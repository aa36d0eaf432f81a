"""What is promised against broken and hostile input. Each row is a test, and a line of docs/hostile.md.

`python -m tests.hostile.promises` writes that page; `test_promises.py` compares it with the tests.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "hostile.md"
HEAD = (
    "# What is promised against which input?\n\n"
    'Each row is a test of `tests/hostile/`. "Refused" means one line on stderr that names the remedy, exit status 2, '
    "and nothing\nwritten or lost. `make test` runs all rows but those marked (long), which `make test-long` runs.\n"
)


class Promise(NamedTuple):
    file: str
    area: str
    given: str
    promised: str
    long: bool


PROMISES: list[Promise] = []


def promised(area: str, *rows: tuple, arguments: str = "", long: bool = False) -> Callable[[Callable], Callable]:
    """Make a test of promises of one `area` of the page.

    Args:
        rows: (what is given, what is promised, *values of the arguments), one test each.
        arguments: names of those arguments of the test, as in "override, words"; without them there is one row.
        long: the tests belong to `make test-long`.
    """
    file = sys._getframe(1).f_globals["__name__"]
    PROMISES.extend(Promise(file, area, given, what, long) for given, what, *_ in rows)

    def mark(test: Callable) -> Callable:
        marked = pytest.mark.long(test) if long else test
        if not arguments:
            return marked
        names = [name.strip() for name in arguments.split(",")]
        cases = [pytest.param(*values, id=given) for given, _, *values in rows]
        assert all(len(case.values) == len(names) for case in cases), f"each row needs values of {arguments}"
        return pytest.mark.parametrize(names, cases)(marked)

    return mark


def page() -> str:
    """docs/hostile.md, from all the tests of this folder."""
    for path in (HERE, HERE.parent):
        sys.path.insert(0, str(path))
    for file in sorted(HERE.glob("test_*.py")):
        importlib.import_module(file.stem)
    rows = sorted(
        importlib.import_module("promises").PROMISES, key=lambda row: row.file
    )  # the tests import it by its name
    lines = [HEAD]
    for area in dict.fromkeys(promise.area for promise in rows):
        lines += [f"\n## {area}\n", "| given | promised |", "| --- | --- |"]
        lines += [
            f"| {p.given}{' (long)' * p.long} | {p.promised} |".replace("\n", " ") for p in rows if p.area == area
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
