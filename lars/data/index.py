"""What a split is made of: files, row groups, rows. Read once from the Parquet footers, by one rank.

`datasets` resolves names, revisions, files and access; rows are then read by (file, row group) with pyarrow and fsspec,
because `reshard()` opens every footer in every process and `.shard(n, i)` costs O(n).
"""
from __future__ import annotations

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lars.config import Data, RecipeError, one_line


@dataclass(frozen=True)
class Index:
    """The row groups of one split, files in the order of their base names. Sample id = row number in that order."""

    files: tuple[str, ...]
    file: np.ndarray  # of each row group
    group_in_file: np.ndarray
    rows: np.ndarray
    fingerprint: str  # SHA-256 over base names, rows and footers: the content, never the path

    @property
    def samples(self) -> int:
        return int(self.rows.sum())

    @property
    def first_row(self) -> np.ndarray:
        """The id of each row group's first row."""
        return np.concatenate([[0], np.cumsum(self.rows)[:-1]])


def build_indexes(data: Data, num_classes: int) -> tuple[Index, Index]:
    """The indexes of the training and the validation split.

    Raises:
        RecipeError: the data set, a split, a file or a column is not there or not what the recipe says.
    """
    files = _resolve(data)
    return tuple(_build(files, data, split, num_classes) for split in (data.train_split, data.val_split))


def fingerprint(train: Index, val: Index) -> str:
    """One SHA-256 for both splits: the data's identity in checkpoints and results."""
    return hashlib.sha256(f"{train.fingerprint} {val.fingerprint}".encode()).hexdigest()


def _resolve(data: Data) -> dict[str, list[str]]:
    import datasets  # two seconds; not needed by anything that only handles an Index
    from huggingface_hub.errors import GatedRepoError

    path = os.path.expanduser(data.path)
    local = os.path.isdir(path)
    if not local and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise RecipeError(f"data.path={data.path}: no such folder")
    if local and not any(name.endswith(".parquet") for _, _, names in os.walk(path) for name in names):
        raise RecipeError(f"data.path={data.path} holds no .parquet file")
    try:
        builder = datasets.load_dataset_builder(path, revision=data.revision)
    except Exception as error:
        raise RecipeError(_explain_access(data.path, error, GatedRepoError)) from None
    return {str(split): sorted(map(str, files), key=os.path.basename) for split, files in (builder.config.data_files or {}).items()}


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
    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(_footer, names))
    digest, file, group_in_file, rows = hashlib.sha256(), [], [], []
    for number, (name, (raw, metadata)) in enumerate(zip(names, footers)):
        _check_columns(name, metadata.schema.to_arrow_schema(), data)
        digest.update(f"{os.path.basename(name)} {metadata.num_rows} ".encode() + raw)
        for group in range(metadata.num_row_groups):
            _check_labels(name, metadata.row_group(group), data.label_column, num_classes)
            file.append(number)
            group_in_file.append(group)
            rows.append(metadata.row_group(group).num_rows)
    if not sum(rows):
        raise RecipeError(f"split {split!r} of data.path={data.path} has no rows")
    return Index(tuple(names), np.array(file), np.array(group_in_file), np.array(rows), digest.hexdigest())


def _footer(name: str) -> tuple[bytes, pq.FileMetaData]:
    """The raw footer and what it says. The footer is the end of the file: its length and `PAR1` are the last 8 bytes."""
    with fsspec.open(name, "rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(max(0, size - 8))
        tail = stream.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or length > size - 12:
            raise RecipeError(f"{name} is not a Parquet file (or it is cut off)")
        stream.seek(size - 8 - length)
        raw = stream.read(length)
    try:
        return raw, pq.read_metadata(io.BytesIO(b"PAR1" + raw + tail))
    except (pa.ArrowException, OSError) as error:
        raise RecipeError(f"{name} is not a readable Parquet file: {one_line(error)}") from None


def _check_columns(name: str, schema: pa.Schema, data: Data) -> None:
    for key, column in (("data.image_column", data.image_column), ("data.label_column", data.label_column)):
        if column not in schema.names:
            raise RecipeError(f"{name} has no column {key}={column}: it has {', '.join(schema.names)}")
    image, label = schema.field(data.image_column).type, schema.field(data.label_column).type
    if not (pa.types.is_struct(image) and any(field.name == "bytes" for field in image)):
        raise RecipeError(f"{name}: column {data.image_column} is {image}, not an image ({{bytes, path}})")
    if not pa.types.is_integer(label):
        raise RecipeError(f"{name}: column {data.label_column} is {label}, not a class number")


def _check_labels(name: str, group: pq.RowGroupMetaData, column: str, num_classes: int) -> None:
    for index in range(group.num_columns):
        chunk = group.column(index)
        if chunk.path_in_schema == column and chunk.statistics is not None and chunk.statistics.has_min_max:
            check_label_range(chunk.statistics.min, chunk.statistics.max, num_classes, name)


def check_label_range(low: int, high: int, num_classes: int, where: str) -> None:
    """Raise RecipeError unless 0 <= low and high < num_classes."""
    if low < 0 or high >= num_classes:
        raise RecipeError(
            f"{where} has labels {low} ... {high}, but model.num_classes={num_classes}"
            + (f": use model.num_classes={high + 1} or more" if low >= 0 else " needs labels from 0")
        )
