"""`lars convert SOURCE OUT`: a local Parquet copy of a data set in the Hub's schema, for `data.path=OUT`.

SOURCE is one of
- an image folder: train/<class>/* and val/ or validation/<class>/*; classes are numbered in the order of their names;
- a folder of classes alone, <class>/*, with --val-share: that share of each class becomes the validation split;
- a folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, which are read in place, never unpacked; the
  validation labels come from ILSVRC2012_devkit_t12.tar.gz beside them or from --val-labels;
- a Hub id, a folder or an address of Parquet files, which are copied byte for byte: the fingerprint stays the same.

OUT is new, empty, or of the same conversion. Start the same command again after any interruption: what is complete
stays, and the files become the same to the byte. OUT/content.json has the hashes of their content. OUT/.convert is for
unfinished work.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from concurrent.futures import BrokenExecutor
from contextlib import nullcontext, redirect_stdout, suppress
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa

from lars.data.conversion import FORM, begun, carry_out, still_to_write, write_json
from lars.data.ilsvrc_tars import TARS, ilsvrc_tars
from lars.data.image_folder import SPLITS, beside, divided_folder, image_folder, is_whole, split_folders
from lars.data.originals import Originals, check_name, check_path
from lars.data.packing import UNFINISHED, Job, copies, packs, rows_of, shrunk
from lars.data.source import DataError
from lars.exact.portable import versions
from lars.recipe.refusal import RecipeError, one_line, printable
from lars.run.lock import LockLost, RunLock

VAL_SHARE = 0.2  # of each class that is held out, where nobody says another
# What does nothing for a kind of source.
_IDLE = {
    "classes": ("val_labels", "revision", "split"),
    "images": ("val_labels", "revision", "val_share"),
    "tars": ("revision", "val_share"),
    "parquet": ("val_labels", "file_mb", "val_share"),
}


def _planned(args: argparse.Namespace) -> tuple[list[Job], dict[str, Any]]:
    """The files that the command line asks for, and what must be the same when it is given again."""
    source = Path(os.path.expanduser(args.source))
    splits = [split for split in SPLITS if split in (args.split or SPLITS)]
    folders = split_folders(source)
    kind = _kind(source, folders, args.val_share)
    _check_options(args, kind)
    if source.is_file():
        raise RecipeError(f"SOURCE={source} is a file: give the folder that it is in")
    for folder in [source] if kind in ("parquet", "classes") else folders:
        if source.is_dir() and Path(os.path.realpath(args.out)).is_relative_to(os.path.realpath(folder)):
            raise RecipeError(f"OUT={args.out} lies in SOURCE: give another place")
    if kind == "parquet":
        writers = []
        _check_files(source)
        jobs, identity = copies(args.out, args.source, args.revision, splits)
    else:
        writers = ["pyarrow"]
        print("convert: listing the images", flush=True)
        if kind == "classes":
            found = divided_folder(source, args.val_share)
        elif kind == "tars":
            found = ilsvrc_tars(source, splits, args.val_labels)
        else:
            found = image_folder(source, splits)
        found.check()
        _say_found(found)
        jobs, identity = packs(args.out, found, args.file_mb or 500)
    if args.resize:
        writers = ["pyarrow", "pillow", "simplejpeg"]
    options = {"kind": kind, "split": splits, "resize": args.resize, "quality": args.resize and (args.quality or 90)}
    if args.val_share is not None:
        options["val_share"] = args.val_share
    writer = ", ".join(f"{package} {version}" for package, version in versions(writers).items()) or None
    return jobs, {"form": FORM, **options, "writer": writer, **identity}


def _kind(source: Path, folders: list[Path], val_share: float | None) -> str:
    """What SOURCE is: "tars", "images" (one of `folders`, its splits', holds folders), "classes" or else "parquet"."""
    if any((source / tar).is_file() for tar in TARS.values()):
        return "tars"
    for folder in folders:
        if any(entry.is_dir() for entry in os.scandir(folder)):
            return "images"
    return "classes" if val_share is not None and source.is_dir() else "parquet"


def _check_options(args: argparse.Namespace, kind: str) -> None:
    """Raise RecipeError for an option that does nothing here, or a number that cannot be."""
    idle = _IDLE[kind] if args.resize else (*_IDLE[kind], "quality")
    for name, value in vars(args).items():
        option = "--" + name.replace("_", "-")
        if value is not None and name in idle:
            why = f"({kind}, {'' if args.resize else 'no '}--resize)"
            raise RecipeError(f"{option} does nothing here {why}: leave it out")
        if name == "val_share" and value is not None and not 0 < value < 1:
            raise RecipeError(f"{option} {value}: give a share between 0 and 1, as in 0.2")
        if isinstance(value, int) and value < 1 or name == "quality" and value and value > 100:
            raise RecipeError(f"{option} {value}: give {'1 to 100' if name == 'quality' else '1 or more'}")


def _check_files(source: Path) -> None:
    """Raise RecipeError for a local folder without Parquet files, or with one that `datasets` would pass over."""
    if not source.is_dir():
        return
    there = list(source.rglob("*.parquet"))
    for file in there:
        if not file.is_file():
            raise RecipeError(f"{file} is no regular file, or a link that leads nowhere: put the file itself there")
    if not there:
        what = "class folders (train/<class>/ and val/<class>/), tar files of ILSVRC, or .parquet files"
        raise RecipeError(f"SOURCE={source} holds none of what is expected: {what}")


def _say_found(found: Originals) -> None:
    for split, rows in found.images.items():
        left_out = found.left_out[split]
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common(5))
        named = f" ({kinds})" if kinds else ""
        classes = len({row.label for row in rows})
        counts = f"{len(rows):,} images of {classes:,} classes; left out: {left_out.total():,} files{named}"
        print(printable(f"convert: {split}: {counts}"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise RecipeError(f"{message} (see --help)")


def _arguments(given: list[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="lars convert", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("source", metavar="SOURCE")
    add("out", metavar="OUT")
    add("--split", action="append", choices=list(SPLITS), help="only this one (default: both)")
    add("--resize", type=int, metavar="S", help="bring the shorter side to S pixels if it is larger, as JPEG")
    add("--quality", type=int, metavar="Q", help="of these JPEGs (default: 90)")
    add("--val-share", type=float, metavar="SHARE", help="of each class, where there are no folders train/ and val/")
    add("--val-labels", type=Path, metavar="FILE", help="Kaggle's LOC_val_solution.csv, or lines `name wnid`")
    add("--revision", help="of a Hub data set: branch, tag or commit")
    add("--file-mb", type=int, metavar="MB", help="of images (before --resize) in each file (default: 500)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    args = parser.parse_args(given)
    for name, value in (("SOURCE", args.source), ("OUT", args.out)):
        check_name(value, f"{name}={value}")
        if not value:
            parser.error(f"{name} is empty: give a folder")
    check_path(args.out, f"OUT={args.out}")  # here, not when it is read: packing can take hours
    args.out = Path(args.out)
    return args


def _convert(args: argparse.Namespace, lock: RunLock, jobs: list[Job], identity: dict[str, Any]) -> None:
    out = args.out
    left, content = still_to_write(jobs, identity, out)

    def place(job: Job, file: Path, entry: dict[str, Any]) -> None:
        lock.check()
        content[job.name] = entry
        # First, so that a file which is there has its hashes.
        write_json(out / "content.json", {"files": dict(sorted(content.items()))})
        os.replace(file, out / job.name)
        if job.part:
            job.part.unlink(missing_ok=True)

    for folder in {(out / job.name).parent for job in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    write_json(out / "content.json", {"files": content})
    write_json(out / "convert.json", identity)
    shrink = partial(shrunk, side=args.resize, quality=identity["quality"]) if args.resize else None
    done = sum(job.amount for job in jobs if job not in left)
    carry_out(left, done, out, place, shrink, args.workers)
    for split in identity["split"]:
        files = [out / job.name for job in jobs if job.split == split]
        size = sum(file.stat().st_size for file in files)
        print(f"convert: {split}: {sum(map(rows_of, files)):,} images in {len(files):,} files of {size:,} bytes")
    bad = [name for job in jobs for name in content[job.name].get("undecodable", [])]
    if bad:
        named = ", ".join(map(str, bad[:3])) + ", ..." * (len(bad) > 3)
        words = "training puts a neighbour in the place of each, content.json names all"
        line = f"warning: {len(bad):,} images cannot be decoded and were kept as they are ({named}): {words}"
        print(printable(line), file=sys.stderr)
    print(printable(f"use it with data.path={os.path.realpath(out)}"))


def pack(folder: Path, *options: str) -> Path:
    """FOLDER-parquet, beside it: the images of an image folder, packed there unless they are; a line says so.

    Args:
        options: of `lars convert`; a folder that is there already keeps those that it was begun with.

    Raises:
        RecipeError: they cannot be packed, or are not those that were packed.
    """
    out = beside(folder)
    if before := begun(out):
        options = ("--resize", str(before["resize"])) if before.get("resize") else ()
    if not split_folders(folder):
        options += ("--val-share", str((before or {}).get("val_share", VAL_SHARE)))
    if not (packed := is_whole(out)):
        print(printable(f"packing the images of {folder} into {out}, once"), flush=True)
    try:
        with redirect_stdout(StringIO()) if packed else nullcontext():  # then it only looks whether they still fit
            convert([str(folder), str(out), *options])
    except (RecipeError, Unfinished) as error:
        raise RecipeError(f"the images of {folder} cannot be packed beside it: {error}") from None
    return out


class Unfinished(RuntimeError):
    """A conversion that the same command would go on with."""


def convert(arguments: list[str] | None) -> None:
    """What the command line asks for.

    Raises:
        RecipeError: it cannot be begun.
        Unfinished: it cannot go on.
    """
    lock = None
    try:
        args = _arguments(arguments)
        begun(args.out)  # what cannot be is said before the images are listed
        jobs, identity = _planned(args)
        if (args.out / UNFINISHED).is_symlink():
            raise RecipeError(f"{args.out / UNFINISHED} is a link, and links are not followed: remove it")
        lock = RunLock(args.out / UNFINISHED, "OUT")
        lock.acquire()
        _convert(args, lock, jobs, identity)
    except OSError as error:
        if lock is None:
            raise RecipeError(one_line(error)) from None
        raise Unfinished(f"{one_line(error)}: once that is mended, the same command goes on") from None
    except (DataError, LockLost, BrokenExecutor, pa.ArrowException, MemoryError) as error:
        raise Unfinished(f"{one_line(error)}: start the same command again to go on") from None
    finally:
        if lock:
            lock.release()
            with suppress(OSError):  # what is not empty stays for the next start
                (args.out / UNFINISHED).rmdir()


def main(arguments: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # batch systems stop a job with it: as Ctrl-C
    try:
        convert(arguments)
    except (RecipeError, Unfinished) as error:
        print("error:", printable(str(error)), file=sys.stderr)
        return 2 if isinstance(error, RecipeError) else 1
    except KeyboardInterrupt:
        print("convert: stopped; start the same command again to go on", file=sys.stderr)
        return 75
    return 0
