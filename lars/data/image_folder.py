"""The images in train/<class>/ and in val/<class>/ or validation/<class>/, and in folders below.

A folder of classes alone is divided: a share of each class becomes the validation split, by a hash of the names.

No link is followed, because it can lead out of the tree or back into it, and nothing but a regular file is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lars.data.originals import ENDINGS, Originals, Row, ending
from lars.recipe.refusal import RecipeError

SPLITS = {"train": ("train",), "validation": ("val", "validation")}  # {split: what its folder may be called}


def image_folder(folder: Path, splits: list[str]) -> Originals:
    """The images of these splits; classes are numbered in the order of the names of the training folders."""
    places: dict[str, Path] = {}
    for split, names in SPLITS.items():
        found = [folder / name for name in names if os.path.lexists(folder / name)]
        if split in splits and not found:
            raise RecipeError(f"{folder} has no folder {' or '.join(names)}: --split takes what there is")
        if split in splits and len(found) > 1:
            raise RecipeError(f"{folder} holds both {' and '.join(names)}: remove the one that is not meant")
        if found:
            places[split] = found[0]
    left_out: dict[str, Counter[str]] = {split: Counter() for split in places}
    names_of = {split: _classes_in(place, left_out[split]) for split, place in places.items()}
    classes = names_of["train" if "train" in places else "validation"]
    images: dict[str, list[Row]] = {split: [] for split in splits}
    for split in splits:
        place = places[split]
        for name in names_of[split]:
            if name not in classes:
                raise RecipeError(
                    f"{place} has a class {name} that {places['train']} has not: classes are numbered by its folders"
                )
            rows = list(_images_in(place / name, classes.index(name), left_out[split]))
            if not rows:
                raise RecipeError(f"{place / name} holds no image ({' '.join(ENDINGS)}): remove it, or give it some")
            images[split] += rows
    return Originals(classes, images, left_out)


def divided_folder(folder: Path, share: float) -> Originals:
    """The images in folder/<class>/, this share of each class for validation; at least one for each split."""
    left_out: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    classes = _classes_in(folder, left_out["train"])
    images: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for label, name in enumerate(classes):
        rows = list(_images_in(folder / name, label, left_out["train"]))
        if len(rows) < 2:
            raise RecipeError(f"{folder / name} holds {len(rows)} images, and two splits need one each: give it some")
        rows.sort(key=lambda row: hashlib.sha256(os.fsencode(os.path.relpath(row.place, folder))).digest())
        held = min(max(1, round(share * len(rows))), len(rows) - 1)
        images["validation"] += rows[:held]
        images["train"] += rows[held:]
    return Originals(classes, images, left_out)


def split_folders(folder: Path) -> list[Path]:
    """The folders in it that are called as those of splits are."""
    return [place for names in SPLITS.values() for name in names if (place := folder / name).is_dir()]


def packed_beside(folder: str) -> Path | None:
    """FOLDER-parquet, where the images of an image folder are packed; None if it holds Parquet files or no images."""
    top = Path(folder)
    if not top.is_dir() or any(top.glob("*.parquet")):
        return None
    files = (file for place in split_folders(top) or [top] for file in place.glob("*/*"))
    images = any(file.name.lower().endswith(ENDINGS) for file in files)
    return beside(top) if images else None


def beside(folder: Path) -> Path:
    """FOLDER-parquet."""
    return Path(f"{os.path.realpath(folder)}-parquet")


def is_whole(out: Path) -> bool:
    """Whether all the images that `lars convert` began to pack into `out` are there."""
    try:
        images = json.loads((out / "convert.json").read_text())["images"]
        return images == sum(pq.read_metadata(file).num_rows for file in out.glob("*.parquet"))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return False


def _classes_in(place: Path, left_out: Counter[str]) -> list[str]:
    _refuse_link(place, place.is_symlink())
    names = []
    for entry in os.scandir(place):
        _refuse_link(entry.path, entry.is_symlink() and entry.is_dir())
        if entry.is_dir():
            names.append(entry.name)
        else:
            left_out[f"{ending(entry.name)} outside the class folders"] += 1
    return sorted(names)


def _images_in(top: Path, label: int, left_out: Counter[str]) -> Iterator[Row]:
    waiting = [str(top)]
    while waiting:
        for entry in os.scandir(waiting.pop()):  # unlike `os.walk`, this fails where a folder cannot be read
            image = entry.name.lower().endswith(ENDINGS)
            _refuse_link(entry.path, entry.is_symlink() and (image or entry.is_dir()))
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            elif not image:
                left_out[ending(entry.name)] += 1
            elif not entry.is_file(follow_symlinks=False):
                raise RecipeError(f"{entry.path} is called an image and is no regular file: remove it")
            else:
                about = entry.stat(follow_symlinks=False)
                yield Row(entry.path, 0, about.st_size, entry.name, label, about.st_mtime_ns)


def _refuse_link(path: Path | str, link: bool) -> None:
    if link:
        raise RecipeError(
            f"{path} is a link, and links are not followed: put there what it leads to (`cp -rL`), or remove it"
        )
