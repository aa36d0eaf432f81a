"""`python -m lars.convert SOURCE OUT`: a local Parquet copy of a data set in the Hub's schema, for `data.path=OUT`.

SOURCE is one of
- an image folder: train/<class>/* and val/ or validation/<class>/*; classes are numbered in the order of their names;
- a folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, which are read in place, never unpacked; the validation
  labels come from ILSVRC2012_devkit_t12.tar.gz beside them or from --val-labels;
- a Hub id, a folder or an address of Parquet files, which are copied byte for byte: the fingerprint stays the same.

Start the same command again after any interruption: what is complete stays, and the files become the same to the byte.
"""
from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import signal
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from lars.config import Data, RecipeError, one_line
from lars.data.decode import BadImage, Encoded
from lars.data.index import resolve
from lars.data.source import DataError, Source
from lars.keyed import permutation

ROW_GROUP = 100  # rows, as on the Hub
SPLITS = {"train": ("train",), "validation": ("val", "validation")}  # {split: what its image folder may be called}
TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
Shrink = Callable[[bytes | None], bytes] | None  # what is done to every image; raises BadImage


class Row(NamedTuple):
    place: str  # the file that holds the image: itself, or a tar
    offset: int  # of its first byte there
    size: int
    name: str
    label: int


class Job(NamedTuple):
    target: Path  # a Parquet file
    amount: int  # of what the progress counts: images, or bytes of a copy
    part: Path | None  # of a copy: what has come so far
    write: Callable[[Shrink], int]  # returns how many images could not be decoded and were kept as they are


def _pack(target: Path, rows: list[Row], classes: list[str], shrink: Shrink) -> int:
    """Make a Parquet file of images."""
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": classes}}
    schema = pa.schema([("image", _IMAGE), ("label", pa.int64())], {"huggingface": json.dumps({"info": {"features": features}})})

    def table(rows: list[Row]) -> pa.Table:
        images = []
        for row in rows:
            with open(row.place, "rb") as file:
                file.seek(row.offset)
                images.append({"bytes": file.read(row.size), "path": row.name})
            if len(images[-1]["bytes"]) != row.size:
                raise DataError(f"{row.place} has become shorter")
        _advance(len(rows))
        return pa.table([pa.array(images, _IMAGE), pa.array([row.label for row in rows], pa.int64())], schema=schema)

    return _write(target, schema, (table(rows[start : start + ROW_GROUP]) for start in range(0, len(rows), ROW_GROUP)), shrink)


def _copy(target: Path, part: Path, original: str, state: str, shrink: Shrink) -> int:
    """Copy a Parquet file by way of `part`, which is a beginning of it at whatever moment a kill comes; re-encode it if asked."""
    source, size = Source(original, Data.retry_seconds), int(state.split()[0])
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
    if not intact or source.state(original) != state or _rows_of(part) is None:
        part.unlink()
        raise DataError(f"{target.name} came damaged, or has changed while it was copied")
    if not shrink:
        os.replace(part, target)
        return 0
    with pq.ParquetFile(part) as whole:
        tables = (whole.read_row_group(group, use_threads=False) for group in range(whole.num_row_groups))
        bad = _write(target, whole.schema_arrow, tables, shrink)
    part.unlink()
    return bad


def _shrink(data: bytes | None, side: int, quality: int) -> bytes:
    """The image as JPEG with its shorter side brought to `side` pixels; one that is no larger keeps its bytes."""
    image = Encoded(data)
    short = min(image.height, image.width)
    if short <= side:
        return data
    pixels = image.pixels(2 * side / short)  # libjpeg leaves out what is beyond twice the size, as Pillow's reducing_gap=2
    size = (round(image.width * side / short), round(image.height * side / short))
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _write(target: Path, schema: pa.Schema, tables: Iterable[pa.Table], shrink: Shrink) -> int:
    """Write a file with a row group per table and put it in place; how many images could not be decoded."""
    bad, temporary = 0, target.with_name(f".{target.name}.{os.getpid()}.tmp")
    plain = [field.name for field in schema if not pa.types.is_struct(field.type)]  # a smallest image would stand in the footer as a whole
    with pq.ParquetWriter(temporary, schema, compression="NONE", use_dictionary=False, write_statistics=plain) as writer:
        for table in tables:
            for number, field in enumerate(schema):
                if shrink and pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
                    images = table.column(number).to_pylist()
                    for image in filter(None, images):
                        try:
                            image["bytes"] = shrink(image["bytes"])
                        except BadImage:
                            bad += 1
                    table = table.set_column(number, field, pa.array(images, field.type))
            writer.write_table(table, row_group_size=max(1, len(table)))
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    return bad


def _rows_of(file: Path) -> int | None:
    """Rows of a Parquet file; None if it is missing or not whole."""
    try:
        return pq.read_metadata(file).num_rows
    except (pa.ArrowException, OSError):
        return None


def _image_folder(folder: Path, splits: list[str]) -> tuple[list[str], dict[str, list[Row]]]:
    """The class names, and the images of each split."""
    places = {split: next((folder / name for name in names if (folder / name).is_dir()), None) for split, names in SPLITS.items()}
    folders = {split: sorted(e.name for e in os.scandir(place) if e.is_dir()) for split, place in places.items() if place}
    classes, found = next(iter(folders.values())), {}
    for split in splits:
        if split not in folders:
            raise RecipeError(f"{folder} has no folder {' or '.join(SPLITS[split])}: --split takes what there is")
        found[split] = []
        for name in folders[split]:
            if name not in classes:
                raise RecipeError(f"{places[split]} has a class {name} that {places['train']} has not: classes are numbered by its folders")
            files = [os.path.join(at, f) for at, _, names in os.walk(places[split] / name, followlinks=True) for f in names]
            label = classes.index(name)
            images = [Row(f, 0, os.path.getsize(f), os.path.basename(f), label) for f in files if f.lower().endswith(_ENDINGS)]
            if not images:
                raise RecipeError(f"{places[split] / name} holds no image ({' '.join(_ENDINGS)}): remove it, or give it some")
            found[split] += images
    return classes, found


def _ilsvrc_tars(folder: Path, splits: list[str], val_labels: Path | None) -> tuple[list[str], dict[str, list[Row]]]:
    """The class names (wnids), and the images of each split by their places in the tar files."""
    for split in splits:
        if not (folder / TARS[split]).is_file():
            raise RecipeError(f"{folder / TARS[split]} is missing: --split takes what there is")
    train, found = folder / TARS["train"], {}
    nested = {PurePosixPath(row.name).stem: row for row in (_members(train) if train.is_file() else [])}
    images = _members(folder / TARS["validation"]) if "validation" in splits else []
    wnids = _validation_wnids(folder, val_labels, sorted(row.name for row in images)) if images else {}
    classes = sorted(nested or set(wnids.values()))
    number = {name: i for i, name in enumerate(classes)}
    if "train" in splits:
        inner = [(number[name], row.offset, row.offset + row.size) for name, row in nested.items()]
        found["train"] = [image._replace(label=label) for label, *span in inner for image in _members(train, *span)]
    if "validation" in splits:
        found["validation"] = [image._replace(label=number.get(wnids.get(PurePosixPath(image.name).stem), -1)) for image in images]
        for image in (image for image in found["validation"] if image.label < 0):
            raise RecipeError(f"{image.name} has no label, or a class that {TARS['train']} has not: these labels are of other images")
    return classes, found


def _members(tar: Path, start: int = 0, stop: int | None = None) -> list[Row]:
    """The files in a tar, not labelled yet; with `start` and `stop` of the tar that lies there in another one."""
    try:
        with open(tar, "rb") as stream:
            stream.seek(start)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                found = [Row(str(tar), m.offset_data, m.size, PurePosixPath(m.name).name, -1) for m in archive if m.isfile()]
    except tarfile.TarError as error:
        raise RecipeError(f"{tar} is damaged ({one_line(error)}): fetch it again") from None
    if any(row.offset + row.size > (stop or os.path.getsize(tar)) for row in found):
        raise RecipeError(f"{tar} is cut off: fetch it again")
    return found


def _validation_wnids(folder: Path, listed: Path | None, names: list[str]) -> dict[str, str]:
    """{name of a validation image without its ending: wnid}; `names` are all of them in order."""
    if listed:
        lines = [line.replace(",", " ").split() for line in listed.read_text().splitlines() if line.strip()]
        if any(len(words) < 2 for words in lines):
            raise RecipeError(f"{listed}: a line is neither `name wnid` nor one of Kaggle's LOC_val_solution.csv")
        return {PurePosixPath(words[0]).stem: words[1] for words in lines if words[0] != "ImageId"}
    if not (folder / DEVKIT).is_file():
        raise RecipeError(f"no validation labels: put {DEVKIT} beside {TARS['validation']}, or give --val-labels LOC_val_solution.csv")
    try:
        from scipy.io import loadmat

        with tarfile.open(folder / DEVKIT) as archive:
            found = {PurePosixPath(m.name).name: archive.extractfile(m).read() for m in archive if m.isfile() and "/data/" in m.name}
        synsets = loadmat(io.BytesIO(found["meta.mat"]), squeeze_me=True)["synsets"]
        wnid = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
        labels = [wnid[int(number)] for number in found["ILSVRC2012_validation_ground_truth.txt"].split()]
    except ImportError:
        raise RecipeError(f"{DEVKIT} holds a MATLAB file, and reading it needs scipy: pip install scipy") from None
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError) as error:
        raise RecipeError(f"{folder / DEVKIT} is damaged ({type(error).__name__}: {one_line(error)}): fetch it again") from None
    if len(labels) != len(names):
        raise RecipeError(f"{DEVKIT} has {len(labels):,} labels, {TARS['validation']} has {len(names):,} images: fetch both again")
    return {PurePosixPath(name).stem: label for name, label in zip(names, labels)}


def _packs(out: Path, classes: list[str], images: dict[str, list[Row]], file_mb: int) -> tuple[list[Job], dict[str, Any]]:
    """Files of about `file_mb` of images, and what identifies them. Training rows are shuffled: see `lars/data/order.py`."""
    jobs, digest = [], hashlib.sha256(json.dumps(classes).encode())
    for split, rows in images.items():
        if not rows:
            raise RecipeError(f"split {split} has no images: they are expected in a folder or a tar per class")
        rows = sorted(rows, key=lambda row: (row.name, row.label, row.place))
        digest.update("".join(f"{split} {row.name} {row.size} {row.label}\n" for row in rows).encode())
        if split == "train":
            rows = [rows[i] for i in permutation(len(rows), 0)]
        groups = -(-len(rows) // ROW_GROUP)
        files = min(groups, max(1, round(sum(row.size for row in rows) / (file_mb * 1e6))))
        for n in range(files):
            first, last = (k * groups // files * ROW_GROUP for k in (n, n + 1))
            target = out / f"{split}-{n:05d}-of-{files:05d}.parquet"
            jobs.append(Job(target, len(rows[first:last]), None, partial(_pack, target, rows[first:last], classes)))
    return jobs, {"file_mb": file_mb, "images": sum(map(len, images.values())), "list": digest.hexdigest()}


def _copies(out: Path, path: str, revision: str | None, splits: list[str]) -> tuple[list[Job], dict[str, Any]]:
    """Every Parquet file of the splits, under its base name, and what identifies them."""
    jobs, states = [], {}
    for split in splits:
        files = resolve(Data(train_split=split, val_split=split, path=path, revision=revision)).get(split)
        if not files:
            raise RecipeError(f"{path} has no split {split!r}: --split takes what there is")
        source = Source(files[0], Data.retry_seconds)
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(source.state, files))
        for file, state in zip(files, found):
            name = os.path.basename(file)
            target = (out if name.startswith(split) else out / split) / name  # `datasets` knows a split by either
            part = target.with_name(f".{name}.{hashlib.sha256(state.encode()).hexdigest()[:16]}.part")  # of this state alone
            jobs.append(Job(target, int(state.split()[0]), part, partial(_copy, target, part, file, state)))
            states[str(target.relative_to(out))] = state
    return jobs, {"files": sorted(states), "states": states}


def _record(jobs: list[Job], identity: dict[str, Any], out: Path) -> None:
    """Keep in `out`/convert.json what is converted there, so that it goes on only with the same source and options."""
    file, remedy = out / "convert.json", "give another OUT, or remove this one"
    if file.is_file():
        before = json.loads(file.read_text())
        for key in (key for key in {**identity, **before} if key != "states" and before.get(key) != identity.get(key)):
            words = "other images or files" if key in ("list", "files") else f"{key}={before.get(key)}, not {identity.get(key)}"
            raise RecipeError(f"{out} was begun with {words}: go on with the same, or {remedy}")
        for name, state in before.get("states", {}).items():
            if identity["states"][name] != state and (out / name).exists():
                raise RecipeError(f"{out} holds {name}, which has changed in its source since: {remedy}")
    elif out.exists() and (not out.is_dir() or any(out.glob("**/*.parquet"))):
        raise RecipeError(f"{out} is there and no conversion: {remedy}")
    for folder in {out, *(job.target.parent for job in jobs)}:
        folder.mkdir(parents=True, exist_ok=True)
    (out / ".convert.json.tmp").write_text(json.dumps(identity, indent=1) + "\n")
    os.replace(out / ".convert.json.tmp", file)


def _carry_out(jobs: list[Job], out: Path, shrink: Shrink, workers: int) -> int:
    """Write the files that are not there yet, one per worker at a time; how many images could not be decoded."""
    left = [job for job in jobs if _rows_of(job.target) is None]
    for leftover in {*out.glob("**/.*.tmp"), *out.glob("**/.*.part")} - {job.part for job in left}:
        leftover.unlink()
    total, others = sum(job.amount for job in jobs), set(multiprocessing.active_children())
    counter = multiprocessing.Value("q", total - sum(job.amount for job in left))
    with ProcessPoolExecutor(min(workers, len(left)) or 1, initializer=_begin_worker, initargs=(counter,)) as pool:
        try:
            return _follow({pool.submit(job.write, shrink) for job in left}, counter, total, "B" if jobs[0].part else "images")
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:
                child.kill()  # every file is written so that this harms nothing
            raise


def _begin_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()  # no orphans


def _advance(amount: int) -> None:
    with _counter.get_lock():
        _counter.value += amount


def _follow(pending: set[Future], counter: Any, total: int, unit: str) -> int:
    """Show the progress until all are done; the sum of what they return."""
    started = last_line = time.monotonic()
    first, result, form = counter.value, 0, {"unit": unit, "unit_scale": True}
    with tqdm(total=total, initial=first, desc="convert", disable=not sys.stderr.isatty(), **form) as bar:
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            result += sum(future.result() for future in done)
            now, count = time.monotonic(), counter.value
            bar.update(count - bar.n)
            if bar.disable and now - last_line > 10:
                last_line = now
                print(f"convert: {tqdm.format_meter(count, total, now - started, ncols=0, initial=first, **form)}", flush=True)
    return result


def _planned(args: argparse.Namespace) -> tuple[list[Job], dict[str, Any]]:
    """The files that the command line asks for, and what must be the same when it is given again."""
    source, splits = Path(args.source).expanduser(), [split for split in SPLITS if split in (args.split or SPLITS)]
    folders = [source / name for names in SPLITS.values() for name in names if (source / name).is_dir()]
    kind = "images" if any(entry.is_dir() for folder in folders for entry in os.scandir(folder)) else "parquet"
    kind = "tars" if any((source / tar).is_file() for tar in TARS.values()) else kind
    idle = {"images": ["val-labels", "revision"], "tars": ["revision"], "parquet": ["val-labels", "file-mb"]}[kind]
    for option, value in ((name.replace("_", "-"), value) for name, value in vars(args).items() if value is not None):
        if option in idle or option == "quality" and not args.resize:
            raise RecipeError(f"--{option} does nothing here ({kind}, {'' if args.resize else 'no '}--resize): leave it out")
        if isinstance(value, int) and value < 1:
            raise RecipeError(f"--{option} {value}: give 1 or more")
    if kind == "parquet" and source.is_dir() and args.out.resolve().is_relative_to(source.resolve()):
        raise RecipeError(f"OUT={args.out} lies in SOURCE: give another place")
    if kind == "parquet":
        jobs, identity = _copies(args.out, args.source, args.revision, splits)
    else:
        print("convert: listing the images", flush=True)
        images = _ilsvrc_tars(source, splits, args.val_labels) if kind == "tars" else _image_folder(source, splits)
        jobs, identity = _packs(args.out, *images, args.file_mb or 500)
    return jobs, {"kind": kind, "split": splits, "resize": args.resize, "quality": args.resize and (args.quality or 90), **identity}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise RecipeError(f"{message} (see --help)")


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(prog="python -m lars.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--split", action="append", choices=list(SPLITS), help="only this one (default: both)")
    parser.add_argument("--resize", type=int, metavar="S", help="bring the shorter side to S pixels if it is larger, as JPEG")
    parser.add_argument("--quality", type=int, metavar="Q", help="of these JPEGs (default: 90)")
    parser.add_argument("--val-labels", type=Path, metavar="FILE", help="Kaggle's LOC_val_solution.csv, or lines `name wnid`")
    parser.add_argument("--revision", help="of a Hub data set: branch, tag or commit")
    parser.add_argument("--file-mb", type=int, metavar="MB", help="of images (before --resize) in each file (default: 500)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    try:
        jobs, identity = _planned(args := parser.parse_args(arguments))
        _record(jobs, identity, args.out)
        shrink = partial(_shrink, side=args.resize, quality=identity["quality"]) if args.resize else None
        bad = _carry_out(jobs, args.out, shrink, args.workers)
    except RecipeError as error:
        print(f"error: {str(error).replace('data.path=', 'SOURCE ')}", file=sys.stderr)
        return 2
    except (DataError, OSError, BrokenExecutor) as error:
        print(f"error: {one_line(error)}: start the same command again to go on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert: stopped; start the same command again to go on", file=sys.stderr)
        return 75
    files = [job.target for job in jobs]
    damaged = f"; {bad:,} of those written now cannot be decoded and were kept as they are" if bad else ""
    print(f"convert: {len(files):,} files, {sum(f.stat().st_size for f in files):,} bytes, {sum(map(_rows_of, files)):,} images{damaged}")
    print(f"use it with data.path={args.out.resolve()}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
