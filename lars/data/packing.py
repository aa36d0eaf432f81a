"""The Parquet files of a local copy: which there are, and how each is written, with the hashes of its content.

Images are put into row groups, originals are copied byte for byte. A worker of `lars.commands.convert` writes into the
folder for unfinished work alone; the process that began the work puts in its place what is finished.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3

from lars.data.content import row_group_hash
from lars.data.decode import BadImage, Encoded
from lars.data.footers import span_of
from lars.data.forked import from_a_child
from lars.data.index import resolve
from lars.data.originals import Originals, Row
from lars.data.source import DataError, Source, size_in
from lars.exact.keyed import permutation
from lars.recipe.keys import Data
from lars.recipe.refusal import RecipeError

ROW_GROUP = 100  # rows, as on the Hub
UNFINISHED = ".convert"  # the folder in OUT for unfinished work; `datasets` reads no hidden one
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
Shrink = Callable[[bytes | None], bytes] | None  # what is done to every image; raises BadImage
Finished = tuple[Path, dict[str, Any]]  # a file among the unfinished work, and what content.json says beside its hashes


class Job(NamedTuple):
    split: str
    name: str  # of a Parquet file, from OUT on
    amount: int  # of what the progress counts: images, or bytes of a copy
    part: Path | None  # of a copy: what has come so far
    write: Callable[[Shrink], Finished]
    rows: Sequence[Row] = ()  # the images that it is made of


def packs(out: Path, found: Originals, file_mb: int) -> tuple[list[Job], dict[str, Any]]:
    """Files of about `file_mb` of images, and what identifies them.

    Training rows are shuffled: see `lars/data/order.py`.
    """
    jobs, digest = [], hashlib.sha256(json.dumps(found.classes).encode())
    for split, rows in found.images.items():
        rows = sorted(rows, key=lambda row: (row.name, row.label, row.place))
        digest.update("".join(f"{split} {row.name} {row.size} {row.label}\n" for row in rows).encode())
        if split == "train":
            rows = [rows[i] for i in permutation(len(rows), 0)]
        groups = -(-len(rows) // ROW_GROUP)
        files = min(groups, max(1, round(sum(row.size for row in rows) / (file_mb * 1e6))))
        for n in range(files):
            first, last = (k * groups // files * ROW_GROUP for k in (n, n + 1))
            name, its = f"{split}-{n:05d}-of-{files:05d}.parquet", rows[first:last]
            write = partial(_pack, out / UNFINISHED / f"{split}.{name}.tmp", its, found.classes)
            jobs.append(Job(split, name, len(its), None, write, its))
    return jobs, {"file_mb": file_mb, "images": sum(map(len, found.images.values())), "list": digest.hexdigest()}


def copies(out: Path, path: str, revision: str | None, splits: list[str]) -> tuple[list[Job], dict[str, Any]]:
    """Every Parquet file of the splits, under its base name, and what identifies them."""
    jobs, states = [], {}
    there = resolve(Data(train_split=splits[0], val_split=splits[-1], path=path, revision=revision), "SOURCE ")
    for split in splits:
        files = there.get(split)
        if not files:
            raise RecipeError(f"{path} has no split {split!r}: --split takes what there is")
        source = Source(files[0], Data.retry_seconds)
        if source.local:
            whole = from_a_child(map(_spans, files))
            if len(whole) < len(files):
                file = files[len(whole)]
                raise RecipeError(f"{file} is not a Parquet file, or is not whole: put a whole one there")
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(source.state, files))
        for file, state in zip(files, found):
            base = os.path.basename(file)
            name = base if base.startswith(split) else f"{split}/{base}"  # `datasets` knows a split by either
            version = hashlib.sha256(state.encode()).hexdigest()[:16]  # a part is of this state alone
            part = out / UNFINISHED / f"{split}.{base}.{version}.part"
            jobs.append(Job(split, name, size_in(state), part, partial(_copy, part, file, state)))
            states[name] = state
    return jobs, {"files": sorted(states), "states": states}


def finish(job: Job, shrink: Shrink) -> tuple[Path, dict[str, Any]]:
    """Write the file of a job among the unfinished work; where it is, and its entry of content.json."""
    file, told = job.write(shrink)
    return file, content_of(file) | {key: value for key, value in told.items() if value}


def times_of(rows: Sequence[Row]) -> str:
    """SHA-256 of when the files that hold these images were changed last."""
    return hashlib.sha256(json.dumps([row.time for row in rows]).encode()).hexdigest()


def _pack(target: Path, rows: list[Row], classes: list[str], shrink: Shrink) -> Finished:
    """Make a Parquet file of images."""
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": classes}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", _IMAGE), ("label", pa.int64())], metadata)
    bad: list[str] = []
    digest = blake3()

    def table(rows: list[Row]) -> pa.Table:
        images = []
        for row in rows:
            images.append({"bytes": row.read(), "path": row.name})
            digest.update(images[-1]["bytes"])
        bad.extend(_change(images, shrink or _checked))
        _advance(len(rows))
        return pa.table([pa.array(images, _IMAGE), pa.array([row.label for row in rows], pa.int64())], schema=schema)

    _write(target, schema, (table(rows[start : start + ROW_GROUP]) for start in range(0, len(rows), ROW_GROUP)))
    originals = {"times": times_of(rows), "blake3": digest.hexdigest()}
    return target, {"originals": originals, "undecodable": bad}


def _copy(part: Path, original: str, state: str, shrink: Shrink) -> Finished:
    """Copy a Parquet file by way of `part`, a beginning of it whenever a kill comes; re-encode it if asked."""
    source, size = Source(original, Data.retry_seconds), size_in(state)
    with open(part, "ab") as file:
        _advance(file.tell())
        while file.tell() < size:
            piece = source.read(original, file.tell(), min(file.tell() + 16 * 2**20, size))
            file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            _advance(len(piece))
    told = (source.files.info(original).get("lfs") or {}).get("sha256")  # by the Hub, of large files
    with open(part, "rb") as file:
        intact = not told or hashlib.file_digest(file, "sha256").hexdigest() == told
    if not intact or os.path.getsize(part) != size or source.state(original) != state or rows_of(part) is None:
        part.unlink()
        raise DataError(f"{os.path.basename(original)} came damaged, or has changed while it was copied")
    if not shrink:
        return part, {}
    target, bad = part.with_suffix(".tmp"), []

    def table(whole: pq.ParquetFile, group: int) -> pa.Table:
        table = whole.read_row_group(group, use_threads=False)
        for number, field in enumerate(table.schema):
            if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
                images = table.column(number).to_pylist()
                bad.extend(_change(images, shrink))
                table = table.set_column(number, field, pa.array(images, field.type))
        return table

    with pq.ParquetFile(part) as whole:
        _write(target, whole.schema_arrow, (table(whole, group) for group in range(whole.num_row_groups)))
    return target, {"undecodable": bad}


def _change(images: list[dict[str, Any] | None], change: Callable[[bytes | None], bytes | None]) -> list[str]:
    """Do `change` to the bytes of every image; the names of those that cannot be decoded, which stay as they are."""
    bad = []
    for image in filter(None, images):
        try:
            image["bytes"] = change(image["bytes"])
        except BadImage:
            bad.append(str(image.get("path")))
    return bad


def _checked(data: bytes | None) -> bytes | None:
    """The image as it is, if its header is one of an image."""
    return Encoded(data).data


def shrunk(data: bytes | None, side: int, quality: int) -> bytes:
    """The image as JPEG with its shorter side brought to `side` pixels; one that is no larger keeps its bytes."""
    image = Encoded(data)
    short = min(image.height, image.width)
    if short <= side:
        return data
    pixels = image.pixels(2 * side / short)  # libjpeg leaves out what is beyond twice the size, as reducing_gap=2 does
    size = (round(image.width * side / short), round(image.height * side / short))
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _write(target: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write a file with a row group per table."""
    # No statistics of images: the smallest one would stand in the footer as a whole.
    plain = [field.name for field in schema if not pa.types.is_struct(field.type)]
    form = {"compression": "NONE", "use_dictionary": False, "write_statistics": plain, "write_page_checksum": True}
    with pq.ParquetWriter(target, schema, **form) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, len(table)))
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def content_of(file: Path) -> dict[str, Any]:
    """SHA-256 of a Parquet file, and BLAKE3 of each row group: its bytes from its first page to the end of its last."""
    spans = _spans(file)
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        with memoryview(whole) as view:
            groups = [row_group_hash(view[start:end]).hex() for start, end in spans]
            return {"sha256": hashlib.sha256(view).hexdigest(), "row_groups_blake3": groups}


def _spans(file: Path | str) -> list[tuple[int, int]]:
    """First byte and end of each row group."""
    metadata = pq.read_metadata(file)
    return [span_of(metadata.row_group(number)) for number in range(metadata.num_row_groups)]


def rows_of(file: Path | str) -> int | None:
    """Rows of a Parquet file; None if it is missing or not whole."""
    try:
        return pq.read_metadata(file).num_rows if os.path.isfile(file) else None
    except (pa.ArrowException, OSError, ValueError):  # the last one of names that are no UTF-8
        return None


def begin_worker(counter: Any) -> None:
    """Make this process a worker that counts what it has done in `counter`."""
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # No orphans: it ends with its parent.
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def _advance(amount: int) -> None:
    with _counter.get_lock():
        _counter.value += amount
