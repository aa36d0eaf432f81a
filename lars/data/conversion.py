"""The folder OUT of `lars convert`: what an earlier start left there, and how what is missing is written.

It holds convert.json (what identifies the conversion), content.json (hashes of each file that is complete), the Parquet
files, and a folder for unfinished work.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from blake3 import blake3
from tqdm import tqdm

from lars.data.image_folder import SPLITS
from lars.data.packing import UNFINISHED, Job, Shrink, begin_worker, content_of, finish, rows_of, times_of
from lars.recipe.refusal import RecipeError

FORM = 2  # of OUT; 1 had neither page checksums nor content.json, and its unfinished work stood beside the files
_REMEDY = "give another OUT, or remove this one"


def begun(out: Path) -> dict[str, Any] | None:
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
    if not whole or "split" not in before or before.get("form", 1) not in (1, FORM):
        raise RecipeError(f"{out / 'convert.json'} is not what lars convert wrote: {_REMEDY}")
    return before


def _read(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        if isinstance(found := json.loads(file.read_text()), dict):
            return found
    raise RecipeError(f"{file} is not what lars convert wrote: {_REMEDY}")


def write_json(file: Path, found: dict[str, Any]) -> None:
    temporary = file.parent / UNFINISHED / f"{file.name}.tmp"
    with open(temporary, "w") as opened:
        opened.write(json.dumps(found, indent=1) + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(temporary, file)


def still_to_write(jobs: list[Job], identity: dict[str, Any], out: Path) -> tuple[list[Job], dict[str, Any]]:
    """The files that are still to be written, and the content of those that are not.

    Raises:
        RecipeError: OUT was begun from another source or with other options, or holds files that no conversion wrote,
            or that were made of other images.
    """
    before = begun(out)
    if not before:
        return jobs, {}
    content = _read(out / "content.json").get("files") if (out / "content.json").exists() else {}
    entries = content.values() if isinstance(content, dict) else [None]
    kinds = (("undecodable", list), ("originals", dict))
    good = [isinstance(e, dict) and all(isinstance(e.get(key, kind()), kind) for key, kind in kinds) for e in entries]
    if not all(good):
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
    _compare([job for job in jobs if job.rows and job not in left], content, out)
    return left, content


def _compare(jobs: list[Job], content: dict[str, Any], out: Path) -> None:
    """Record in `content` what these files in OUT were made of; images are only read where their times are others.

    That can take hours, so each file's answer is written at once. A conversion of before times were recorded counts as
    made of the images that are there now.

    Raises:
        RecipeError: a file was made of other images.
    """
    others = [job for job in jobs if content[job.name].get("originals", {}).get("times") != times_of(job.rows)]
    if others:
        images = f"{sum(len(job.rows) for job in others):,} images"
        print(f"{out}: {images} have other times than were recorded, and are read and compared once", flush=True)
    for job in others:
        content[job.name]["originals"] = _compared(job, content[job.name].get("originals", {}), out)
        write_json(out / "content.json", {"files": content})


def _compared(job: Job, then: dict[str, str], out: Path) -> dict[str, str]:
    """What a file in OUT was made of, as its images are read now."""
    digest = blake3()
    for row in tqdm(job.rows, desc=f"compare {job.name}", unit=" images", disable=None, leave=False):
        digest.update(row.read())
    if then and then.get("blake3") != digest.hexdigest():
        newest = max(job.rows, key=lambda row: row.time).place
        raise RecipeError(
            f"{out / job.name} was made of other images than are there now (the one that changed last is {newest}): "
            f"put them back, or {_REMEDY}"
        )
    return {"times": times_of(job.rows), "blake3": digest.hexdigest()}


def carry_out(left: list[Job], done: int, out: Path, place: Callable[..., None], shrink: Shrink, workers: int) -> None:
    """Write files, one per worker at a time, and put each in its place."""
    unfinished, others = out / UNFINISHED, set(multiprocessing.active_children())
    ours = re.compile(rf"({'|'.join(SPLITS)})\..*\.parquet\.(tmp|[0-9a-f]{{16}}\.(tmp|part))", re.DOTALL)
    for leftover in set(unfinished.iterdir()) - {job.part for job in left}:
        if ours.fullmatch(leftover.name):
            leftover.unlink()
    for job in left:
        if job.part:  # an older version kept what had come beside the file
            old = (out / job.name).with_name(job.part.name.removeprefix(job.split))
            if old.is_file():
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
