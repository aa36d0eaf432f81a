"""What a split is made of: files, row groups, rows. Read once from the Parquet footers, by one rank, and given to the others.

`datasets` resolves names, revisions, files and access; rows are then read by (file, row group), one range of bytes each,
because `reshard()` opens every footer in every process and `.shard(n, i)` costs O(n).
"""
from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lars.config import Data, RecipeError, one_line
from lars.data.source import DataError, Source

_AT_ONCE = 16  # footers that are read at the same time


@dataclass(frozen=True)
class Index:
    """The row groups of one split, files in the order of their base names. Sample id = row number in that order."""

    files: tuple[str, ...]
    file: np.ndarray  # of each row group
    group_in_file: np.ndarray
    rows: np.ndarray
    fingerprint: str  # SHA-256 over base names, rows and footers: the content, never the path
    spans: np.ndarray | None = None  # int64 (row groups, 2): first byte and end of the image and label columns
    footers: tuple[bytes, ...] = ()  # of each file, as they stand at its end
    states: tuple[str, ...] = ()  # size and version of each file: a file that changes under a run ends it
    classes_per_group: float | None = None  # at most so many on average, from the footers' smallest and largest labels
    root: str = ""  # the folder of local files

    @cached_property
    def samples(self) -> int:
        return int(self.rows.sum())

    @cached_property
    def first_row(self) -> np.ndarray:
        """The id of each row group's first row."""
        return np.concatenate([[0], np.cumsum(self.rows)[:-1]])

    @cached_property
    def bytes_per_group(self) -> float:
        return 0.0 if self.spans is None else float(np.mean(self.spans[:, 1] - self.spans[:, 0]))

    def group_of(self, ids: np.ndarray) -> np.ndarray:
        """The row groups in which these samples stand."""
        return np.searchsorted(self.first_row, ids, side="right") - 1


def build_indexes(data: Data, num_classes: int) -> tuple[Index, Index]:
    """The indexes of the training and the validation split.

    Raises:
        RecipeError: the data set, a split, a file or a column is not there or not what the recipe says.
    """
    files = resolve(data)
    try:
        return tuple(_build(files, data, split, num_classes) for split in (data.train_split, data.val_split))
    except DataError as error:
        raise RecipeError(str(error)) from None


def fingerprint(train: Index, val: Index) -> str:
    """One SHA-256 for both splits: the data's identity in checkpoints and results."""
    return hashlib.sha256(f"{train.fingerprint} {val.fingerprint}".encode()).hexdigest()


def on_this_node(index: Index, data: Data, verify: bool) -> Index:
    """Another node's index for the files of this one: paths and times of change are each node's own.

    Raises:
        RecipeError: a file is not there, or (asked with `verify`) it has another footer here.
    """
    if not index.root:
        return index
    root = os.path.abspath(data.place)
    names = tuple(os.path.join(root, os.path.relpath(name, index.root)) for name in index.files)
    source = Source(names[0], data.retry_seconds)
    try:
        states = tuple(map(source.state, names))
        footers = tuple(map(partial(_footer, source), names, states)) if verify else index.footers
    except DataError as error:
        raise RecipeError(str(error)) from None
    for name, here, there in zip(names, footers, index.footers):
        if here != there:
            raise RecipeError(f"{name} has {_content(name, here)}, rank 0's has {_content(name, there)}: all nodes need the same data")
    return replace(index, files=names, states=states, root=root)


def _content(name: str, footer: bytes) -> str:
    return f"{parse_footer(name, footer).num_rows:,} rows (footer {hashlib.sha256(footer).hexdigest()[:12]})"


def _digest(names: Sequence[str], footers: Sequence[bytes]) -> str:
    """Over base names, rows and footers: the content as far as footers tell it, never the path."""
    digest = hashlib.sha256()
    for name, raw in zip(names, footers):
        digest.update(f"{os.path.basename(name)} {parse_footer(name, raw).num_rows} ".encode() + raw)
    return digest.hexdigest()


def resolve(data: Data) -> dict[str, list[str]]:
    """{split: its files in the order of their base names}; a Hub id, a folder, or the address of a folder (https://, s3://, ...).

    Raises:
        RecipeError: there is nothing, or no access to it.
    """
    import datasets  # two seconds; not needed by anything that only handles an Index
    from huggingface_hub.errors import GatedRepoError

    path = data.place
    local, address = os.path.isdir(path), "://" in path
    if address and ("@" in path or "?" in path):  # it would stand in config.yaml and in logs
        raise RecipeError("data.path holds credentials or a signature: leave them to the file system's own environment variables")
    if not local and not address and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise RecipeError(f"data.path={data.path}: no such folder")
    if local and not any(name.endswith(".parquet") for _, _, names in os.walk(path) for name in names):
        raise RecipeError(f"data.path={data.path} holds no .parquet file")
    try:
        if address:
            parts = {split: f"{path.rstrip('/')}/{split}-*.parquet" for split in (data.train_split, data.val_split)}
            builder = datasets.load_dataset_builder("parquet", data_files=parts)
        else:
            builder = datasets.load_dataset_builder(path, revision=data.revision)
    except Exception as error:
        raise RecipeError(_explain_access(data.path, error, GatedRepoError)) from None
    found = {str(split): sorted(map(str, files), key=os.path.basename) for split, files in (builder.config.data_files or {}).items()}
    for split, names in found.items():
        twice = [name for name, count in Counter(map(os.path.basename, names)).items() if count > 1]
        if twice:
            raise RecipeError(f"split {split!r} of data.path={data.path} has two files named {twice[0]}: sample ids need one order of names")
    return found


def _explain_access(path: str, error: Exception, gated: type[Exception]) -> str:
    chain, cause = [], error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(e, gated) or "is a gated dataset" in str(e) for e in chain):
        return (
            f"data.path={path} is gated: accept its licence at huggingface.co/datasets/{path} while logged in, then run "
            "`hf auth login` (or set HF_TOKEN) on every node"
        )
    if any(isinstance(e, ConnectionError) for e in chain):
        return f"data.path={path}: no folder of that name here, and the Hub cannot be reached"
    return f"data.path={path}: {one_line(error)}"


def _build(files: dict[str, list[str]], data: Data, split: str, num_classes: int) -> Index:
    if split not in files:
        raise RecipeError(f"data.path={data.path} has no split {split!r}: it has {', '.join(sorted(files)) or 'none'}")
    names = files[split]
    source = Source(names[0], data.retry_seconds)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        states = tuple(pool.map(source.state, names))
        footers = _cached(source, names, states) or tuple(pool.map(lambda name, state: _footer(source, name, state), names, states))
    _keep(source, names, states, footers)
    file, group_in_file, rows, spans, classes = [], [], [], [], []
    for number, (name, raw) in enumerate(zip(names, footers)):
        metadata = parse_footer(name, raw)
        _check_columns(name, metadata.schema.to_arrow_schema(), data)
        for group in range(metadata.num_row_groups):
            rows.append(metadata.row_group(group).num_rows)
            file.append(number)
            group_in_file.append(group)
            span, labels = _columns_of(metadata.row_group(group), data)
            spans.append(span)
            if labels:
                check_label_range(*labels, num_classes, name)
                classes.append(min(rows[-1], labels[1] - labels[0] + 1))
    if not sum(rows):
        raise RecipeError(f"split {split!r} of data.path={data.path} has no rows")
    known = float(np.mean(classes)) if len(classes) == len(rows) else None
    path = data.place
    root = os.path.abspath(path) if os.path.isdir(path) else ""
    places = np.array(file), np.array(group_in_file), np.array(rows)
    return Index(tuple(names), *places, _digest(names, footers), np.array(spans), footers, states, known, root)


def _footer(source: Source, name: str, state: str) -> bytes:
    """The raw footer: it ends the file, and the last 8 bytes are its length and `PAR1`."""
    size = int(state.split()[0])
    tail = source.read(name, max(0, size - 8), size) if size else b""
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or length > size - 12:
        raise RecipeError(f"{name} is not a Parquet file (or it is cut off)")
    return source.read(name, size - 8 - length, size - 8)


def parse_footer(name: str, raw: bytes) -> pq.FileMetaData:
    """What a raw footer says.

    Raises:
        RecipeError: it is damaged.
    """
    try:
        return pq.read_metadata(io.BytesIO(b"PAR1" + raw + len(raw).to_bytes(4, "little") + b"PAR1"))
    except (pa.ArrowException, OSError) as error:
        raise RecipeError(f"{name} is not a readable Parquet file: {one_line(error)}") from None


def _cache_file(names: list[str], states: tuple[str, ...]) -> Path:
    key = hashlib.sha256("\n".join(f"{name} {state}" for name, state in zip(names, states)).encode()).hexdigest()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lars" / f"footers-{key}.npz"


def _cached(source: Source, names: list[str], states: tuple[str, ...]) -> tuple[bytes, ...] | None:
    """Footers of remote files as an earlier start read them; a file that changed has another state, and so another key."""
    if source.local:
        return None
    try:
        with np.load(_cache_file(names, states), allow_pickle=False) as kept:
            return tuple(kept[str(number)].tobytes() for number in range(len(names)))
    except (OSError, ValueError, KeyError):
        return None


def _keep(source: Source, names: list[str], states: tuple[str, ...], footers: tuple[bytes, ...]) -> None:
    file = _cache_file(names, states)
    if source.local or file.exists() or not all(" " in state for state in states):  # a size alone is no version
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, **{str(number): np.frombuffer(raw, np.uint8) for number, raw in enumerate(footers)})
        os.replace(temporary, file)
    except OSError:  # a home that cannot be written costs the next start a few requests
        return


def _check_columns(name: str, schema: pa.Schema, data: Data) -> None:
    for key, column in (("data.image_column", data.image_column), ("data.label_column", data.label_column)):
        if column not in schema.names:
            raise RecipeError(f"{name} has no column {key}={column}: it has {', '.join(schema.names)}")
    image, label = schema.field(data.image_column).type, schema.field(data.label_column).type
    if not (pa.types.is_struct(image) and any(field.name == "bytes" for field in image)):
        raise RecipeError(f"{name}: column {data.image_column} is {image}, not an image ({{bytes, path}})")
    if not pa.types.is_integer(label):
        raise RecipeError(f"{name}: column {data.label_column} is {label}, not a class number")


def _columns_of(group: pq.RowGroupMetaData, data: Data) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """Where the bytes of a row group's images and labels lie, and its smallest and largest label if the footer tells."""
    starts, ends, labels = [], [], None
    for chunk in map(group.column, range(group.num_columns)):
        name = chunk.path_in_schema.split(".")[0]
        if name in (data.image_column, data.label_column):
            start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
            starts.append(start)
            ends.append(start + chunk.total_compressed_size)
        if chunk.path_in_schema == data.label_column and chunk.statistics is not None and chunk.statistics.has_min_max:
            labels = chunk.statistics.min, chunk.statistics.max
    return (min(starts), max(ends)), labels


def check_label_range(low: int, high: int, num_classes: int, where: str) -> None:
    """Raise RecipeError unless 0 <= low and high < num_classes."""
    if low < 0 or high >= num_classes:
        raise RecipeError(
            f"{where} has labels {low} ... {high}, but model.num_classes={num_classes}"
            + (f": use model.num_classes={high + 1} or more" if low >= 0 else " needs labels from 0")
        )
