"""What Parquet footers say: where the bytes of row groups lie, what they take in memory, which labels they hold."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lars.data.forked import from_a_child
from lars.data.source import Source, size_in
from lars.recipe.keys import Data
from lars.recipe.refusal import RecipeError, one_line

_SIGNATURE = 28  # bytes that follow the metadata of a file with encrypted columns
_A_ROW = 100  # bytes of Python's own for each image


class Group(NamedTuple):
    """A row group."""

    rows: int
    span: tuple[int, int]  # first byte and end of the image and label columns
    memory: int  # bytes that its images and labels take, unpacked
    labels: tuple[int, int] | None  # smallest and largest, if the footer tells


class Footer(NamedTuple):
    """What is known of a raw footer where it is not at hand."""

    size: int  # bytes
    sha256: str

    @classmethod
    def of(cls, raw: bytes) -> Footer:
        return cls(len(raw), hashlib.sha256(raw).hexdigest())


def read_footer(source: Source, name: str, state: str) -> bytes:
    """The raw footer: it ends the file, and the last 8 bytes are its length and `PAR1`."""
    size = size_in(state)
    tail = source.read(name, max(0, size - 8), size, state) if size else b""
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] == b"PARE":
        raise RecipeError(f"{name} is encrypted, and no key can be given: decrypt it first")
    if tail[4:] != b"PAR1" or length > size - 12:
        raise RecipeError(f"{name} is not a Parquet file (or it is cut off)")
    return source.read(name, size - 8 - length, size - 8, state)


def parse_footer(name: str, raw: bytes) -> pq.FileMetaData:
    """What a raw footer says. In the main process only of footers that `describe` has passed.

    Raises:
        RecipeError: it is damaged.
    """
    try:
        metadata = pq.read_metadata(io.BytesIO(b"PAR1" + raw + len(raw).to_bytes(4, "little") + b"PAR1"))
    except (pa.ArrowException, OSError) as error:
        raise RecipeError(f"{name} is not a readable Parquet file: {one_line(error)}") from None
    if len(raw) - metadata.serialized_size == _SIGNATURE:
        raise RecipeError(f"{name} has encrypted columns, and no key can be given: decrypt it first")
    return metadata


def describe(names: Sequence[str], footers: Sequence[bytes], states: Sequence[str], data: Data) -> list[list[Group]]:
    """The row groups of each of these files, as their footers say; a child of this process reads them.

    Raises:
        RecipeError: one is damaged, or not of images and class numbers.
    """

    def told() -> Iterator[list[Group]]:
        for name, raw, state in zip(names, footers, states):
            try:
                yield _describe(name, raw, size_in(state), data)
            except RecipeError:
                raise
            except Exception as error:  # whatever else pyarrow raises is about the file too
                raise RecipeError(f"{name} is not a readable Parquet file: {one_line(error)}") from None

    found = from_a_child(told())
    if len(found) < len(names):
        raise RecipeError(f"{names[len(found)]} is not a readable Parquet file: pyarrow breaks down over its footer")
    return found


def check_label_range(low: int, high: int, num_classes: int, where: str) -> None:
    """Raise RecipeError unless 0 <= low and high < num_classes."""
    if low < 0 or high >= num_classes:
        raise RecipeError(
            f"{where} has labels {low} ... {high}, but model.num_classes={num_classes}"
            + (f": use model.num_classes={high + 1} or more" if low >= 0 else " needs labels from 0")
        )


def span_of(group: pq.RowGroupMetaData, columns: Sequence[str] | None = None) -> tuple[int, int]:
    """First byte and end of some columns of a row group, or of all."""
    spans = []
    for chunk in map(group.column, range(group.num_columns)):
        if columns is None or chunk.path_in_schema.split(".")[0] in columns:
            start = max(0, min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)), default=0))
            spans.append((start, start + chunk.total_compressed_size))
    return min((start for start, _ in spans), default=0), max((end for _, end in spans), default=0)


def has_dictionary(group: pq.RowGroupMetaData, column: str) -> bool:
    """Whether values of this column may stand in the file once and count often."""
    chunks = (group.column(number) for number in range(group.num_columns))
    return any(
        "DICTIONARY" in encoding for chunk in chunks if chunk.path_in_schema == column for encoding in chunk.encodings
    )


def _describe(name: str, raw: bytes, size: int, data: Data) -> list[Group]:
    metadata = parse_footer(name, raw)
    _check_columns(name, metadata.schema.to_arrow_schema(), data)
    groups = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        span, whole = span_of(group, (data.image_column, data.label_column)), span_of(group)
        if not 4 <= whole[0] <= span[0] < span[1] <= whole[1] <= size - 8 - len(raw) or group.num_rows < 0:
            place = f"row group {number} should lie at bytes {span[0]:,} ... {span[1]:,} of {size:,}"
            raise RecipeError(f"{name} is damaged or cut off: {place}")
        memory, labels = _A_ROW * group.num_rows, None
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema in (data.label_column, f"{data.image_column}.bytes"):
                memory += max(chunk.total_uncompressed_size, chunk.total_compressed_size)
            statistics = chunk.statistics if chunk.path_in_schema == data.label_column else None
            if statistics is not None and statistics.has_null_count and statistics.null_count:
                raise _missing_labels(statistics.null_count, name, number)
            if statistics is not None and statistics.has_min_max:
                labels = int(statistics.min), int(statistics.max)
        groups.append(Group(group.num_rows, span, memory, labels))
    if sum(group.rows for group in groups) != metadata.num_rows:
        raise RecipeError(f"{name} is damaged: its row groups do not add up to its {metadata.num_rows:,} rows")
    return groups


def check_no_null(labels: pa.ChunkedArray, name: str, group: int) -> None:
    """Raise RecipeError unless every image of a row group has a label: not every footer says how many are null."""
    if labels.null_count:
        raise _missing_labels(labels.null_count, name, group)


def _missing_labels(count: int, name: str, group: int) -> RecipeError:
    remedy = "every image needs a class number, leave out those without"
    return RecipeError(f"{count:,} labels in row group {group} of {name} are null: {remedy}")


def _check_columns(name: str, schema: pa.Schema, data: Data) -> None:
    for key, column in (("data.image_column", data.image_column), ("data.label_column", data.label_column)):
        if schema.names.count(column) != 1:
            how = "several columns" if column in schema.names else "no column"
            raise RecipeError(f"{name} has {how} {key}={column}: it has {', '.join(schema.names)}")
    image, label = schema.field(data.image_column).type, schema.field(data.label_column).type
    fields = [field.type for field in image if field.name == "bytes"] if pa.types.is_struct(image) else []
    if len(fields) != 1 or not (pa.types.is_binary(fields[0]) or pa.types.is_large_binary(fields[0])):
        raise RecipeError(
            f"{name}: column {data.image_column} is {image}, not an image (a struct with `bytes: binary`)"
        )
    if not pa.types.is_integer(label):
        raise RecipeError(f"{name}: column {data.label_column} is {label}, not a class number")
