"""The images in ILSVRC2012's tar files, which are read in place, never unpacked.

The training tar holds a tar for each class, called by its wnid. The validation tar holds images alone; their labels
come from the devkit beside it, or from a list.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath

from lars.data.forked import from_a_child
from lars.data.originals import ENDINGS, Originals, Row, ending
from lars.recipe.refusal import RecipeError, one_line

TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_PADDING = 20 * 1024  # most zero bytes at the end of a tar, which fills up 10 KiB; more are a part that never came
_DEVKIT_BYTES = 2**26  # of a file in the devkit; the real ones have 150 kB at most


def ilsvrc_tars(folder: Path, splits: list[str], val_labels: Path | None) -> Originals:
    """The classes (wnids), and the images of these splits."""
    for split in splits:
        if not (folder / TARS[split]).is_file():
            raise RecipeError(f"{folder / TARS[split]} is missing: --split takes what there is")
    train = folder / TARS["train"]
    left_out: dict[str, Counter[str]] = {split: Counter() for split in TARS}
    class_tars = _class_tars(train, left_out["train"]) if train.is_file() else {}
    # First the labels: they are few, and the training images are many to look for in vain.
    images = _members(folder / TARS["validation"], ENDINGS, left_out["validation"]) if "validation" in splits else []
    wnids = _validation_wnids(folder, val_labels, sorted(row.name for row in images)) if images else {}
    classes = sorted(class_tars or set(wnids.values()))
    found: dict[str, list[Row]] = {split: [] for split in splits}
    if "train" in splits:
        for label, (_, tar) in enumerate(sorted(class_tars.items())):
            found["train"] += _images_of_class(train, tar, label, left_out["train"])
    if "validation" in splits:
        found["validation"] = _labelled(images, wnids, classes)
    return Originals(classes, found, left_out)


def _class_tars(train: Path, left_out: Counter[str]) -> dict[str, Row]:
    """{wnid: its tar inside the training tar}."""
    tars = _members(train, (".tar",), left_out)
    found = {_stem(row.name): row for row in tars}
    if len(found) < len(tars):
        raise RecipeError(f"{train} holds two tars of one class: fetch it again")
    return found


def _images_of_class(train: Path, tar: Row, label: int, left_out: Counter[str]) -> list[Row]:
    images = _members(train, ENDINGS, left_out, tar.offset, tar.offset + tar.size)
    if not images:
        raise RecipeError(f"{train}: {tar.name} holds no image ({' '.join(ENDINGS)}): fetch it again")
    return [image._replace(label=label) for image in images]


def _labelled(images: list[Row], wnids: dict[str, str], classes: list[str]) -> list[Row]:
    """The validation images with their labels; each has one, and none is left."""
    number = {wnid: label for label, wnid in enumerate(classes)}
    found = []
    for image in images:
        wnid = wnids.get(_stem(image.name))
        if wnid not in number:
            raise RecipeError(
                f"{image.name} has no label, or a class that {TARS['train']} has not: these labels are of other images"
            )
        found.append(image._replace(label=number[wnid]))
    missing = sorted(wnids.keys() - {_stem(image.name) for image in images})
    if missing:
        what = f"{len(missing):,} labels are of images that {TARS['validation']} has not"
        raise RecipeError(f"{what} ({missing[0]}): fetch it again")
    return found


def _members(
    tar: Path, endings: tuple[str, ...], left_out: Counter[str], start: int = 0, stop: int | None = None
) -> list[Row]:
    """The files in a tar that are called so, not labelled yet; a tar in another one lies from `start` to `stop`.

    Python's `tarfile` takes whatever is no header for the end. So the end must be one: some zeros up to `stop`.
    """
    about = os.stat(tar)
    stop = about.st_size if stop is None else stop
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
            left_out[ending(name)] += 1
        elif not place:
            what = "no regular file (a link that leads nowhere, a device, a sparse file)"
            raise RecipeError(f"{tar}: {member.name} is {what}: fetch it again")
        elif name in found:
            raise RecipeError(f"{tar} holds {name} twice: fetch it again")
        else:
            found[name] = Row(str(tar), *place, name, -1, about.st_mtime_ns)
    return list(found.values())


def _validation_wnids(folder: Path, listed: Path | None, names: list[str]) -> dict[str, str]:
    """{name of a validation image without its ending: wnid}; `names` are all of them in order."""
    if listed:
        return _listed_wnids(listed)
    if not (folder / DEVKIT).is_file():
        raise RecipeError(
            f"no validation labels: put {DEVKIT} beside {TARS['validation']}, or give --val-labels LOC_val_solution.csv"
        )
    if not (found := from_a_child(map(_devkit_wnids, [folder / DEVKIT]))):
        raise RecipeError(f"{folder / DEVKIT} is damaged (scipy breaks down over it): fetch it again")
    (labels,) = found
    if len(labels) != len(names):
        raise RecipeError(
            f"{DEVKIT} has {len(labels):,} labels, {TARS['validation']} has {len(names):,} images: fetch both again"
        )
    return {_stem(name): label for name, label in zip(names, labels)}


def _devkit_wnids(devkit: Path) -> list[str]:
    """The wnids of the validation images in their order."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise RecipeError(f"{DEVKIT} holds a MATLAB file, and reading it needs scipy: pip install scipy") from None
    try:
        with tarfile.open(devkit) as archive:
            members = {PurePosixPath(m.name).name: m for m in archive if m.isreg() and "/data/" in m.name}
            files = [members[name] for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")]
            if any(member.size > _DEVKIT_BYTES for member in files):
                raise ValueError(f"more than {_DEVKIT_BYTES:,} bytes in a file")
            meta, truth = (archive.extractfile(member).read() for member in files)
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnid = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
        return [wnid[int(number)] for number in truth.split()]
    except Exception as error:  # scipy, zlib and tarfile raise many classes for damaged bytes
        why = f"{type(error).__name__}: {one_line(error)}"
        raise RecipeError(f"{devkit} is damaged ({why}): fetch it again") from None


def _listed_wnids(file: Path) -> dict[str, str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"--val-labels {file} cannot be read ({one_line(error)}): give LOC_val_solution.csv, or lines `name wnid`"
        ) from None
    found: dict[str, str] = {}
    rows = [line.replace(",", " ").split() for line in lines if line.strip()]
    if any(len(words) < 2 for words in rows):
        raise RecipeError(f"{file}: a line is neither `name wnid` nor one of Kaggle's LOC_val_solution.csv")
    for name, wnid, *_ in rows:
        if name == "ImageId":  # the heading of Kaggle's file
            continue
        if found.setdefault(_stem(name), wnid) != wnid:
            raise RecipeError(f"{file} gives {name} two labels, {found[_stem(name)]} and {wnid}: remove one")
    return found


def _stem(name: str) -> str:
    """The name of a member of a tar, without folders and ending."""
    return PurePosixPath(name).stem
