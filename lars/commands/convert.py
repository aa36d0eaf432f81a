"""`lars convert SOURCE OUT`: a local Parquet copy of a data set in the Hub's schema, for `data.path=OUT`.

SOURCE is one of
- an image folder: train/<class>/* and val/ or validation/<class>/*; classes are numbered in the order of their names;
- a folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, which are read in place, never unpacked; the
  validation labels come from ILSVRC2012_devkit_t12.tar.gz beside them or from --val-labels;
- a Hub id, a folder or an address of Parquet files, which are copied byte for byte: the fingerprint stays the same.

OUT is new, empty, or of the same conversion. Start the same command again after any interruption: what is complete
stays, and the files become the same to the byte. OUT/content.json has the hashes of their content. OUT/.convert is for
unfinished work.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from lars.data.originals import SPLITS, TARS, check_name, ilsvrc_tars, image_folder
from lars.data.packing import UNFINISHED, Job, Shrink, begin_worker, content_of, copies, finish, packs, rows_of, shrunk
from lars.data.source import DataError
from lars.exact.portable import versions
from lars.recipe.refusal import RecipeError, one_line
from lars.run.lock import LockLost, RunLock

_FORM = 2  # of OUT; 1 had neither page checksums nor content.json, and its unfinished work stood beside the files
_REMEDY = "give another OUT, or remove this one"


def _before(out: Path) -> dict[str, Any] | None:
    """What an earlier start recorded in `out`; None if there is nothing at all.

    Raises:
        RecipeError: it holds something else than a conversion.
    """
    if not os.path.lexists(out):
        return None
    if not out.is_dir():
        raise RecipeError(f"OUT={out} is no folder: give another OUT")
    if not (out / "convert.json").is_file():
        if any(name != UNFINISHED for name in os.listdir(out)):
            raise RecipeError(f"OUT={out} is not empty and no conversion: give another OUT")
        return None
    before = _read(out / "convert.json")
    states = before.get("states", {})
    whole = isinstance(states, dict) and sorted(states) == before.get("files", [])
    if not whole or "split" not in before or before.get("form", 1) not in (1, _FORM):
        raise RecipeError(f"{out / 'convert.json'} is not what lars convert wrote: {_REMEDY}")
    return before


def _read(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        if isinstance(found := json.loads(file.read_text()), dict):
            return found
    raise RecipeError(f"{file} is not what lars convert wrote: {_REMEDY}")


def _write(file: Path, found: dict[str, Any]) -> None:
    temporary = file.parent / UNFINISHED / f"{file.name}.tmp"
    with open(temporary, "w") as opened:
        opened.write(json.dumps(found, indent=1) + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(temporary, file)


def _left(jobs: list[Job], identity: dict[str, Any], out: Path) -> tuple[list[Job], dict[str, Any]]:
    """The files that are still to be written, and the content of those that are not.

    Raises:
        RecipeError: OUT was begun from another source or with other options, or holds files that no conversion wrote.
    """
    before = _before(out)
    if not before:
        return jobs, {}
    content = _read(out / "content.json").get("files") if (out / "content.json").exists() else {}
    entries = content.values() if isinstance(content, dict) else [None]
    if not all(isinstance(entry, dict) and isinstance(entry.get("undecodable", []), list) for entry in entries):
        raise RecipeError(f"{out / 'content.json'} is not what lars convert wrote: {_REMEDY}")
    for key in {**identity, **before}:
        if key in ("states", "form", "writer") or before.get(key) == identity.get(key):
            continue
        other = f"{key}={before.get(key)}, not {identity.get(key)}"
        words = "other images or files" if key in ("list", "files") else other
        raise RecipeError(f"{out} was begun with {words}: go on with the same, or {_REMEDY}")
    left = []
    for job in jobs:
        there = os.path.lexists(out / job.name)
        if there and "states" in identity and before["states"][job.name] != identity["states"][job.name]:
            raise RecipeError(f"{out} holds {job.name}, which has changed in its source since: {_REMEDY}")
        if there and job.name not in content and "form" in before:
            raise RecipeError(f"{out} holds {job.name}, which this conversion did not write: move it away")
        if rows_of(out / job.name) is None:
            left.append(job)
        elif job.name not in content:
            content[job.name] = content_of(out / job.name)
    if left and before.get("writer") != identity["writer"]:
        was = before.get("writer") or "an older version of lars convert"
        raise RecipeError(f"{out} was begun with {was}; {identity['writer']} may write other bytes: {_REMEDY}")
    return left, content


def _carry_out(left: list[Job], done: int, out: Path, place: Callable[..., None], shrink: Shrink, workers: int) -> None:
    """Write files, one per worker at a time, and put each in its place."""
    unfinished, others = out / UNFINISHED, set(multiprocessing.active_children())
    ours = re.compile(rf"({'|'.join(SPLITS)})\..*\.parquet\.(tmp|[0-9a-f]{{16}}\.(tmp|part))", re.DOTALL)
    for leftover in set(unfinished.iterdir()) - {job.part for job in left}:
        if ours.fullmatch(leftover.name):
            leftover.unlink()
    for job in left:  # an older version kept what had come beside the file
        old = job.part and (out / job.name).with_name(job.part.name.removeprefix(job.split))
        if old and old.is_file():
            os.replace(old, job.part)
    counter = multiprocessing.Value("q", done)
    with ProcessPoolExecutor(min(workers, len(left)) or 1, initializer=begin_worker, initargs=(counter,)) as pool:
        try:
            _follow({pool.submit(finish, job, shrink): job for job in left}, place, counter)
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:
                child.kill()  # every file is written so that this harms nothing
            raise


def _follow(jobs: dict[Future, Job], place: Callable[..., None], counter: Any) -> None:
    """Show the progress until all are done, and put in its place what is."""
    started = last_line = time.monotonic()
    first, pending = counter.value, set(jobs)
    total = first + sum(job.amount for job in jobs.values())
    form = {"unit": "B" if any(job.part for job in jobs.values()) else "images", "unit_scale": True}
    with tqdm(total=total, initial=first, desc="convert", disable=not sys.stderr.isatty(), **form) as bar:
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                place(jobs[future], *future.result())
            now, count = time.monotonic(), counter.value
            bar.update(count - bar.n)
            if bar.disable and now - last_line > 10:
                last_line = now
                meter = tqdm.format_meter(count, total, now - started, ncols=0, initial=first, **form)
                print(f"convert: {meter}", flush=True)


def _planned(args: argparse.Namespace) -> tuple[list[Job], dict[str, Any]]:
    """The files that the command line asks for, and what must be the same when it is given again."""
    source, out = Path(os.path.expanduser(args.source)), args.out
    splits = [split for split in SPLITS if split in (args.split or SPLITS)]
    folders = [source / name for names in SPLITS.values() for name in names if (source / name).is_dir()]
    kind = "images" if any(entry.is_dir() for folder in folders for entry in os.scandir(folder)) else "parquet"
    kind = "tars" if any((source / tar).is_file() for tar in TARS.values()) else kind
    idle = {"images": ["val-labels", "revision"], "tars": ["revision"], "parquet": ["val-labels", "file-mb"]}[kind]
    for option, value in ((name.replace("_", "-"), value) for name, value in vars(args).items() if value is not None):
        if option in idle or option == "quality" and not args.resize:
            why = f"({kind}, {'' if args.resize else 'no '}--resize)"
            raise RecipeError(f"--{option} does nothing here {why}: leave it out")
        if isinstance(value, int) and not 1 <= value <= (100 if option == "quality" else value):
            raise RecipeError(f"--{option} {value}: give {'1 to 100' if option == 'quality' else '1 or more'}")
    if source.is_file():
        raise RecipeError(f"SOURCE={source} is a file: give the folder that it is in")
    for folder in [source] if kind == "parquet" else folders:
        if source.is_dir() and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
            raise RecipeError(f"OUT={out} lies in SOURCE: give another place")
    writers = ("pyarrow", "pillow", "simplejpeg") if args.resize else () if kind == "parquet" else ("pyarrow",)
    if kind == "parquet":
        there = list(source.rglob("*.parquet")) if source.is_dir() else []
        for file in (file for file in there if not file.is_file()):  # `datasets` passes over it
            raise RecipeError(f"{file} is no regular file, or a link that leads nowhere: put the file itself there")
        if source.is_dir() and not there:
            what = "class folders (train/<class>/ and val/<class>/), tar files of ILSVRC, or .parquet files"
            raise RecipeError(f"SOURCE={source} holds none of what is expected: {what}")
        jobs, identity = copies(out, args.source, args.revision, splits)
    else:
        print("convert: listing the images", flush=True)
        found = ilsvrc_tars(source, splits, args.val_labels) if kind == "tars" else image_folder(source, splits)
        for split, rows in found.checked().images.items():
            counts = f"{len(rows):,} images of {len({row.label for row in rows}):,} classes"
            without, kinds = found.left_out[split].total(), found.left_out[split].most_common(5)
            named = f" ({', '.join(f'{count:,} {kind}' for kind, count in kinds)})" if kinds else ""
            print(_plain(f"convert: {split}: {counts}; left out: {without:,} files{named}"))
        jobs, identity = packs(out, found, args.file_mb or 500)
    options = {"kind": kind, "split": splits, "resize": args.resize, "quality": args.resize and (args.quality or 90)}
    writer = ", ".join(f"{package} {version}" for package, version in versions(writers).items()) or None
    return jobs, {"form": _FORM, **options, "writer": writer, **identity}


def _plain(text: str) -> str:
    """In one line, whatever a file is called."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
    add("--val-labels", type=Path, metavar="FILE", help="Kaggle's LOC_val_solution.csv, or lines `name wnid`")
    add("--revision", help="of a Hub data set: branch, tag or commit")
    add("--file-mb", type=int, metavar="MB", help="of images (before --resize) in each file (default: 500)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    args = parser.parse_args(given)
    for name, value in (("SOURCE", args.source), ("OUT", args.out)):
        check_name(value, f"{name}={value}")
        if not value:
            parser.error(f"{name} is empty: give a folder")
    args.out = Path(args.out)
    return args


def _convert(args: argparse.Namespace, lock: RunLock, jobs: list[Job], identity: dict[str, Any]) -> None:
    out = args.out
    left, content = _left(jobs, identity, out)

    def place(job: Job, file: Path, entry: dict[str, Any]) -> None:
        lock.check()
        content[job.name] = entry
        _write(out / "content.json", {"files": dict(sorted(content.items()))})  # first: so a file there has its hashes
        os.replace(file, out / job.name)
        if job.part:
            job.part.unlink(missing_ok=True)

    for folder in {(out / job.name).parent for job in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    _write(out / "content.json", {"files": content})
    _write(out / "convert.json", identity)
    shrink = partial(shrunk, side=args.resize, quality=identity["quality"]) if args.resize else None
    done = sum(job.amount for job in jobs if job not in left)
    _carry_out(left, done, out, place, shrink, args.workers)
    for split in identity["split"]:
        files = [out / job.name for job in jobs if job.split == split]
        size = sum(file.stat().st_size for file in files)
        print(f"convert: {split}: {sum(map(rows_of, files)):,} images in {len(files):,} files of {size:,} bytes")
    bad = [name for job in jobs for name in content[job.name].get("undecodable", [])]
    if bad:
        named = ", ".join(map(str, bad[:3])) + ", ..." * (len(bad) > 3)
        words = "training puts a neighbour in the place of each, content.json names all"
        line = f"warning: {len(bad):,} images cannot be decoded and were kept as they are ({named}): {words}"
        print(_plain(line), file=sys.stderr)
    print(f"use it with data.path={os.path.realpath(out)}")


def main(arguments: list[str] | None = None) -> int:
    lock = None
    try:
        args = _arguments(arguments)
        _before(args.out)  # what cannot be is said before the images are listed
        jobs, identity = _planned(args)
        if (args.out / UNFINISHED).is_symlink():
            raise RecipeError(f"{args.out / UNFINISHED} is a link, and links are not followed: remove it")
        lock = RunLock(args.out / UNFINISHED)
        lock.acquire()
        _convert(args, lock, jobs, identity)
    except RecipeError as error:
        words = str(error).replace("data.path=", "SOURCE ").replace("give this run its own", "give another")
        print("error:", _plain(words.replace("run_dir=...", "OUT").replace("run_dir=", "OUT=")), file=sys.stderr)
        return 2
    except OSError as error:
        advice = ": once that is mended, the same command goes on" if lock else ""
        print("error:", _plain(f"{one_line(error)}{advice}"), file=sys.stderr)
        return 1 if lock else 2
    except (DataError, LockLost, BrokenExecutor, pa.ArrowException, MemoryError) as error:
        print("error:", _plain(f"{one_line(error)}: start the same command again to go on"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert: stopped; start the same command again to go on", file=sys.stderr)
        return 75
    finally:
        if lock:
            lock.release()
            with suppress(OSError):  # what is not empty stays for the next start
                (args.out / UNFINISHED).rmdir()
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
