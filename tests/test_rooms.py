"""The rooms of `lars/`: imports run one way, those inside functions too, and `import lars` is torch alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

LARS = Path(__file__).parents[1] / "lars"
ORDER = ("exact", "optim", "recipe", "data", "engine", "run", "plan", "report", "commands")
"""Each room may import those before it, but `optim` and `exact` know nobody."""
ALONE = ("exact", "optim")
FILES = sorted(LARS.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """The modules of this library that a file names in an import, wherever that stands."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative imports hide where a name comes from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] == "lars"}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else ""


@pytest.mark.parametrize("file", [f for f in FILES if f.parent != LARS], ids=lambda f: str(f.relative_to(LARS)))
def test_imports_run_one_way(file: Path) -> None:
    own = file.relative_to(LARS).parts[0]
    others = {room_of(name) for name in imported(file)} - {own}
    allowed = set() if own in ALONE else set(ORDER[: ORDER.index(own)])
    assert others <= allowed, f"lars/{own} may not import {', '.join(sorted(others - allowed)) or 'the package itself'}"


def test_a_way_back_would_be_seen(tmp_path: Path) -> None:
    """The test above reads imports inside functions, and of modules by their names."""
    (tmp_path / "late.py").write_text("def f():\n    from lars.run import lock\n    import lars.plan.cost\n")
    assert {room_of(name) for name in imported(tmp_path / "late.py")} == {"run", "plan"}


def test_every_file_has_a_room_and_fits() -> None:
    assert {f.name for f in LARS.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {f.name for f in LARS.iterdir() if f.is_dir()} - {"__pycache__"} == set(ORDER)
    long = {str(f.relative_to(LARS)): n for f in FILES if (n := len(f.read_text().splitlines())) > 300}
    assert not long
