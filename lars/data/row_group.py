"""A row group of a Parquet file, from its bytes in memory: encoded images, labels and names."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lars.data.footers import has_dictionary
from lars.recipe.keys import Data

DAMAGED = (pa.ArrowException, OSError, ValueError, LookupError, TypeError)  # what pyarrow raises over damaged pages


class RowGroup(NamedTuple):
    images: pa.ChunkedArray  # binary, or a dictionary of it
    labels: pa.ChunkedArray
    names: list[str | None]  # of the images in the data set, if they were asked for

    def bytes_of(self, rows: np.ndarray | None) -> list[bytes | None]:
        """Images of some rows, or of all; of a dictionary, one that is there a thousand times takes its memory once."""
        found: list[bytes | None] = []
        images = self.images
        if rows is not None and len(rows) < len(images):
            images = images.take(pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(rows)]))
        if not pa.types.is_dictionary(images.type):
            return images.to_pylist()
        for chunk in images.chunks:
            places = chunk.indices.to_pylist()
            values = {place: chunk.dictionary[place].as_py() for place in set(places) - {None}}
            found += map(values.get, places)
        return found


def parse(
    raw: bytes, first: int, size: int, footer: pq.FileMetaData, number: int, data: Data, *, names: bool
) -> RowGroup:
    """Row group `number` of a file of `size` bytes; `raw` has all bytes of it, and begins at byte `first` of the file.

    Args:
        names: whether the names of the images are wanted too.

    Raises:
        DAMAGED: it is damaged, as far as pyarrow or its checksums tell.
    """
    column = f"{data.image_column}.bytes"
    dictionary = [column] * has_dictionary(footer.row_group(number), column)
    part = pa.PythonFile(_Part(raw, first, size), mode="r")
    parquet = pq.ParquetFile(part, metadata=footer, read_dictionary=dictionary, page_checksum_verification=True)
    columns = [column, *[f"{data.image_column}.path"] * names, data.label_column]
    table = parquet.read_row_group(number, columns, use_threads=False)
    parts = table[data.image_column].chunks
    named = [part.field("path").to_pylist() for part in parts if part.type.get_field_index("path") >= 0]
    images = pa.chunked_array([part.field("bytes") for part in parts])
    return RowGroup(images, table[data.label_column], sum(named, []) or [None] * len(table))


class _Part:
    """The bytes [start, ...) of a file of `size` bytes, as a file for pyarrow, which asks for nothing else."""

    def __init__(self, data: bytes, start: int, size: int) -> None:
        self.data, self.start, self.length, self.position, self.closed = memoryview(data), start, size, 0, False

    def read(self, count: int = -1) -> memoryview:
        begin = self.position - self.start
        part = self.data[begin : begin + count] if count >= 0 else self.data[begin:]
        self.position += len(part)
        return part

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        self.position = position + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def close(self) -> None:
        self.closed = True
