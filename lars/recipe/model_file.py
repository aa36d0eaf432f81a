"""The `model.py` beside a recipe: run once, by its path, so that it registers its models with timm."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from os.path import isfile
from pathlib import Path

from lars.recipe.refusal import RecipeError, one_line

model_files: dict[Path, list[Path]] = {}  # each `model.py` that was run, and those that it ran in turn: a run's sources
_running: list[Path] = []


def import_model_file(folder: Path) -> None:
    """Run the `model.py` in a recipe's folder, if there is one, so that it registers its models with timm.

    Raises:
        RecipeError: whatever it raises, with its line.
    """
    file = (Path(folder) / "model.py").resolve()
    for outer in _running:
        model_files[outer].append(file)
    if isfile(file) and file not in model_files:
        model_files[file] = []
        spec = importlib.util.spec_from_file_location(f"recipe_model_{len(model_files)}", file)
        assert spec is not None and spec.loader is not None  # it ends in .py
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        _running.append(file)
        try:
            spec.loader.exec_module(sys.modules[spec.name])
        except (Exception, SystemExit) as error:
            del model_files[file]
            if isinstance(error, RecipeError):  # of a model.py that this one runs
                raise
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
            if isinstance(error, SyntaxError) and error.filename == str(file):
                lines.append(error.lineno)
            place = f"{file}, line {lines[-1]}" if lines else str(file)
            raise RecipeError(f"{place}: {type(error).__name__}: {one_line(error)}") from None
        finally:
            _running.pop()
