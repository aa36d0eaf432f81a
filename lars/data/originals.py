"""The images that `lars convert` packs: each one by its place, and a count of the files that are left out.

What is called an image and cannot be taken is refused by name, not left out: no image is missing unseen.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import NamedTuple

from lars.data.decode import MAX_BYTES
from lars.data.source import DataError
from lars.recipe.refusal import RecipeError

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder

_ODD = ("*", "?", "[", "\n", "::", "${")  # parts of a path: patterns and addresses of `datasets`, a recipe's references


class Row(NamedTuple):
    place: str  # the file that holds the image: itself, or a tar
    offset: int  # of its first byte there
    size: int
    name: str
    label: int
    time: int  # of the last change of that file, in ns

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            DataError: there are fewer than when it was listed.
        """
        with open(self.place, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise DataError(f"{self.place} has become shorter")
        return data


class Originals(NamedTuple):
    classes: list[str]
    images: dict[str, list[Row]]  # of each split
    left_out: dict[str, Counter[str]]  # of each split: how many files of which kind

    def check(self) -> None:
        """Raise RecipeError unless each image can stand in a Parquet file and be read by training."""
        for name in self.classes:
            check_name(name, f"class {name}")
        for split, rows in self.images.items():
            if not rows:
                raise RecipeError(f"split {split} has no images: they are expected in a folder or a tar per class")
            for row in rows:
                where = row.place if os.path.basename(row.place) == row.name else f"{row.place}: {row.name}"
                check_name(row.name, where)
                if row.size > MAX_BYTES:
                    limit = f"training reads no image of more than {MAX_BYTES:,}"
                    raise RecipeError(f"{where} has {row.size:,} bytes, and {limit}: remove it")


def check_name(name: str, where: str) -> None:
    """Raise RecipeError unless a name is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise RecipeError(f"{where}: the name is not UTF-8, which Parquet needs: rename it") from None


def check_path(path: str, where: str) -> None:
    """Raise RecipeError for a folder of Parquet files that `datasets` or a recipe would take for something else."""
    odd = next((part for part in _ODD if part in os.path.realpath(path)), None)
    if odd:
        raise RecipeError(f"{where}: {odd!r} in the path of a folder has a meaning of its own: rename that folder")


def ending(name: str) -> str:
    """What a file is counted as that is left out."""
    return os.path.splitext(name)[1].lower() or "no ending"
