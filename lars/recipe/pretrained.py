"""Weights that `model.kwargs` loads from a file: a run begins with them, so their content is part of what it is.

timm takes them as `checkpoint_path=FILE`, for a model of the same shape, or as `pretrained=true` with
`pretrained_cfg_overlay={file: FILE}`, which fits another number of classes. `model.weights_sha256` is filled in from
the file; a run that has a checkpoint goes on without it.
"""

from __future__ import annotations

import hashlib
from os.path import isfile
from pathlib import Path
from typing import Any

from lars.recipe.refusal import RecipeError

_REMEDY = "save them as FILE.safetensors and write model.kwargs.checkpoint_path=FILE.safetensors"


def weights_file(kwargs: dict[str, Any]) -> Path | None:
    """The file whose weights a model begins with, there or not.

    Raises:
        RecipeError: weights of another kind, whose content nobody has fixed.
    """
    overlay, path = kwargs.get("pretrained_cfg_overlay") or {}, kwargs.get("checkpoint_path")
    if kwargs.get("pretrained"):
        fixed = isinstance(overlay, dict) and overlay.keys() - {"num_classes"} == {"file"}
        if path or kwargs.get("pretrained_cfg") or not fixed or not overlay["file"]:  # timm takes no file for the Hub's
            raise RecipeError(f"model.kwargs.pretrained=true takes weights that may change behind a name: {_REMEDY}")
        path = overlay["file"]
    if path and not (isinstance(path, str) and path.endswith(".safetensors")):
        raise RecipeError(f"model.kwargs names {path}: only safetensors is read, other formats can run code: {_REMEDY}")
    return Path(path) if path else None


def content(kwargs: dict[str, Any], expected: str | None) -> str | None:
    """SHA-256 of that file; `expected` where the file is not there, None where no file is named.

    Raises:
        RecipeError: the file is not what is expected.
    """
    file = weights_file(kwargs)
    if file is None or not isfile(file):
        if file is None and expected:
            raise RecipeError("model.weights_sha256 is given, and model.kwargs names no file of weights: remove it")
        return expected
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if expected not in (None, found):
        raise RecipeError(f"{file} has other weights than model.weights_sha256 says: {found[:12]}, not {expected[:12]}")
    return found


def without_lost_weights(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` for a model whose weights come from a checkpoint, where the file is gone; else as they are."""
    file = weights_file(kwargs)
    if file is None or isfile(file):
        return kwargs
    return {k: v for k, v in kwargs.items() if k not in ("checkpoint_path", "pretrained", "pretrained_cfg_overlay")}


def require(kwargs: dict[str, Any], run_dir: str) -> None:
    """Before a run begins without a checkpoint: the file is there.

    Raises:
        RecipeError: it is not.
    """
    file = weights_file(kwargs)
    if file is not None and not isfile(file):
        raise RecipeError(f"model.kwargs names {file}, which is not there, and {run_dir} has no checkpoint")
