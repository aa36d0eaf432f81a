"""What an image folder or ILSVRC's tar files hold: every image by its place, and a count of what is left out.

No link is followed, because it can lead out of the tree or back into it, and nothing but a regular file is opened.
What is called an image and cannot be taken is refused by name, not left out: no image is missing unseen.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lars.data.decode import MAX_BYTES
from lars.recipe.refusal import RecipeError, one_line

SPLITS = {"train": ("train",), "validation": ("val", "validation")}  # {split: what its image folder may be called}
TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder
_PADDING = 20 * 1024  # most zero bytes at the end of a tar, which fills up 10 KiB; more are a part that never came
_DEVKIT_BYTES = 2**26  # of a file in the devkit; the real ones have 150 kB at most


class Row(NamedTuple):
    place: str  # the file that holds the image: itself, or a tar
    offset: int  # of its first byte there
    size: int
    name: str
    label: int


class Originals(NamedTuple):
    classes: list[str]
    images: dict[str, list[Row]]  # of each split
    left_out: dict[str, Counter[str]]  # of each split: how many files of which kind

    def checked(self) -> Originals:
        """These, if each can stand in a Parquet file and be read by training.

        Raises:
            RecipeError: one that cannot.
        """
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
        return self


def check_name(name: str, where: str) -> None:
    """Raise RecipeError unless a name is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise RecipeError(f"{where}: the name is not UTF-8, which Parquet needs: rename it") from None


def image_folder(folder: Path, splits: list[str]) -> Originals:
    """Images in train/<class>/ and val/<class>/ and in folders below; classes are numbered in their names' order."""
    places = {
        split: [folder / name for name in names if os.path.lexists(folder / name)] for split, names in SPLITS.items()
    }
    places = {split: found for split, found in places.items() if found}
    for split in splits:
        if split not in places:
            raise RecipeError(f"{folder} has no folder {' or '.join(SPLITS[split])}: --split takes what there is")
        if len(places[split]) > 1:
            raise RecipeError(f"{folder} holds both {' and '.join(SPLITS[split])}: remove the one that is not meant")
    left_out: dict[str, Counter[str]] = {split: Counter() for split in places}
    folders = {split: _classes_in(found[0], left_out[split]) for split, found in places.items()}
    classes, images = next(iter(folders.values())), {}
    for split in splits:
        images[split], place = [], places[split][0]
        for name in folders[split]:
            if name not in classes:
                raise RecipeError(
                    f"{place} has a class {name} that {places['train'][0]} has not: classes are numbered by its folders"
                )
            found = list(_images_in(place / name, classes.index(name), left_out[split]))
            if not found:
                raise RecipeError(f"{place / name} holds no image ({' '.join(_ENDINGS)}): remove it, or give it some")
            images[split] += found
    return Originals(classes, images, left_out)


def _classes_in(place: Path, left_out: Counter[str]) -> list[str]:
    _refuse_link(place, place.is_symlink())
    names = []
    for entry in os.scandir(place):
        _refuse_link(entry.path, entry.is_symlink() and entry.is_dir())
        if entry.is_dir():
            names.append(entry.name)
        else:
            left_out[f"{_ending(entry.name)} outside the class folders"] += 1
    return sorted(names)


def _images_in(top: Path, label: int, left_out: Counter[str]) -> Iterator[Row]:
    waiting = [str(top)]
    while waiting:
        for entry in os.scandir(waiting.pop()):  # unlike `os.walk`, this fails where a folder cannot be read
            image = entry.name.lower().endswith(_ENDINGS)
            _refuse_link(entry.path, entry.is_symlink() and (image or entry.is_dir()))
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            elif not image:
                left_out[_ending(entry.name)] += 1
            elif not entry.is_file(follow_symlinks=False):
                raise RecipeError(f"{entry.path} is called an image and is no regular file: remove it")
            else:
                yield Row(entry.path, 0, entry.stat(follow_symlinks=False).st_size, entry.name, label)


def _refuse_link(path: Path | str, link: bool) -> None:
    if link:
        raise RecipeError(
            f"{path} is a link, and links are not followed: put there what it leads to (`cp -rL`), or remove it"
        )


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no ending"


def ilsvrc_tars(folder: Path, splits: list[str], val_labels: Path | None) -> Originals:
    """The classes (wnids), and the images by their places in the tar files."""
    for split in splits:
        if not (folder / TARS[split]).is_file():
            raise RecipeError(f"{folder / TARS[split]} is missing: --split takes what there is")
    train, found, left_out = folder / TARS["train"], {}, {split: Counter() for split in SPLITS}
    tars = _members(train, (".tar",), left_out["train"]) if train.is_file() else []
    nested = {PurePosixPath(row.name).stem: row for row in tars}
    if len(nested) < len(tars):
        raise RecipeError(f"{train} holds two tars of one class: fetch it again")
    images = _members(folder / TARS["validation"], _ENDINGS, left_out["validation"]) if "validation" in splits else []
    wnids = _validation_wnids(folder, val_labels, sorted(row.name for row in images)) if images else {}
    classes = sorted(nested or set(wnids.values()))
    if "train" in splits:
        found["train"] = []
        for label, (_, row) in enumerate(sorted(nested.items())):
            inner = _members(train, _ENDINGS, left_out["train"], row.offset, row.offset + row.size)
            if not inner:
                raise RecipeError(f"{train}: {row.name} holds no image ({' '.join(_ENDINGS)}): fetch it again")
            found["train"] += [image._replace(label=label) for image in inner]
    if "validation" in splits:
        number = {name: label for label, name in enumerate(classes)}
        found["validation"] = [
            image._replace(label=number.get(wnids.get(PurePosixPath(image.name).stem), -1)) for image in images
        ]
        for image in (image for image in found["validation"] if image.label < 0):
            raise RecipeError(
                f"{image.name} has no label, or a class that {TARS['train']} has not: these labels are of other images"
            )
        missing = sorted(wnids.keys() - {PurePosixPath(image.name).stem for image in images})
        if missing:
            what = f"{len(missing):,} labels are of images that {TARS['validation']} has not"
            raise RecipeError(f"{what} ({missing[0]}): fetch it again")
    return Originals(classes, found, left_out)


def _members(
    tar: Path, endings: tuple[str, ...], left_out: Counter[str], start: int = 0, stop: int | None = None
) -> list[Row]:
    """The files in a tar that are called so, not labelled yet; a tar in another one lies from `start` to `stop`.

    Python's `tarfile` takes whatever is no header for the end. So the end must be one: some zeros up to `stop`.
    """
    stop = os.path.getsize(tar) if stop is None else stop
    with open(tar, "rb") as stream:
        stream.seek(start)
        members, end = [], start
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    if member.size < 0 or archive.offset <= end:  # it would be read again and again
                        raise tarfile.TarError(f"{member.name} has no size")
                    members.append(member)
                    end = archive.offset
        except OSError:
            raise
        except Exception as error:  # tarfile raises many classes for damaged headers
            raise RecipeError(f"{tar} is damaged ({one_line(error)}): fetch it again") from None
        stream.seek(end)
        rest = stream.read(min(stop - end, _PADDING + 1)) if end < stop else b""
    if len(rest) < tarfile.BLOCKSIZE:
        raise RecipeError(f"{tar} is cut off: fetch it again")
    if rest.strip(b"\0") or len(rest) > _PADDING:
        what = "neither a header nor the end is there" if rest.strip(b"\0") else "too many zeros are there"
        raise RecipeError(f"{tar} is damaged at byte {end:,} ({what}): fetch it again")
    files: dict[str, tuple[int, int]] = {}  # of hard links too: they are another name of a file before them
    found: dict[str, Row] = {}
    for member in members:
        name, place = PurePosixPath(member.name).name, None
        if member.isreg() and not member.issparse():
            place = (member.offset_data, member.size)
        elif member.islnk():
            place = files.get(member.linkname)
        if place:
            files[member.name] = place
        if member.isdir():
            continue
        if not name.lower().endswith(endings):
            left_out[_ending(name)] += 1
        elif not place:
            what = "no regular file (a link that leads nowhere, a device, a sparse file)"
            raise RecipeError(f"{tar}: {member.name} is {what}: fetch it again")
        elif name in found:
            raise RecipeError(f"{tar} holds {name} twice: fetch it again")
        else:
            found[name] = Row(str(tar), *place, name, -1)
    return list(found.values())


def _validation_wnids(folder: Path, listed: Path | None, names: list[str]) -> dict[str, str]:
    """{name of a validation image without its ending: wnid}; `names` are all of them in order."""
    if listed:
        return _listed_wnids(listed)
    if not (folder / DEVKIT).is_file():
        raise RecipeError(
            f"no validation labels: put {DEVKIT} beside {TARS['validation']}, or give --val-labels LOC_val_solution.csv"
        )
    try:
        with ProcessPoolExecutor(1) as pool:  # scipy's reader can end the process that reads damaged bytes
            labels = pool.submit(_devkit_wnids, folder / DEVKIT).result()
    except ImportError:
        raise RecipeError(f"{DEVKIT} holds a MATLAB file, and reading it needs scipy: pip install scipy") from None
    except Exception as error:  # scipy, zlib and tarfile raise many classes for them
        why = f"{type(error).__name__}: {one_line(error)}"
        raise RecipeError(f"{folder / DEVKIT} is damaged ({why}): fetch it again") from None
    if len(labels) != len(names):
        raise RecipeError(
            f"{DEVKIT} has {len(labels):,} labels, {TARS['validation']} has {len(names):,} images: fetch both again"
        )
    return {PurePosixPath(name).stem: label for name, label in zip(names, labels)}


def _devkit_wnids(devkit: Path) -> list[str]:
    """The wnids of the validation images in their order."""
    from scipy.io import loadmat

    with tarfile.open(devkit) as archive:
        members = {PurePosixPath(m.name).name: m for m in archive if m.isreg() and "/data/" in m.name}
        files = [members[name] for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")]
        if any(member.size > _DEVKIT_BYTES for member in files):
            raise ValueError(f"more than {_DEVKIT_BYTES:,} bytes in a file")
        meta, truth = (archive.extractfile(member).read() for member in files)
    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    wnid = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
    return [wnid[int(number)] for number in truth.split()]


def _listed_wnids(file: Path) -> dict[str, str]:
    try:
        lines = [
            line.replace(",", " ").split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"--val-labels {file} cannot be read ({one_line(error)}): give LOC_val_solution.csv, or lines `name wnid`"
        ) from None
    if any(len(words) < 2 for words in lines):
        raise RecipeError(f"{file}: a line is neither `name wnid` nor one of Kaggle's LOC_val_solution.csv")
    found: dict[str, str] = {}
    for name, wnid, *_ in (words for words in lines if words[0] != "ImageId"):
        if found.setdefault(PurePosixPath(name).stem, wnid) != wnid:
            raise RecipeError(
                f"{file} gives {name} two labels, {found[PurePosixPath(name).stem]} and {wnid}: remove one"
            )
    return found
