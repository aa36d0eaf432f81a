"""What a split is made of: files, row groups, rows. One rank reads it from the footers and gives it to the others.

`datasets` resolves names, revisions, files and access; rows are then read by (file, row group), one range of bytes
each, because `reshard()` opens every footer in every process and `.shard(n, i)` costs O(n).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from lars.data.content import Content
from lars.data.footers import Footer, Group, check_label_range, describe, read_footer
from lars.data.image_folder import is_whole, packed_beside
from lars.data.originals import check_path
from lars.data.source import DataError, Source, causes
from lars.recipe.keys import Data
from lars.recipe.refusal import RecipeError, one_line

_AT_ONCE = 16  # footers that are read at the same time


@dataclass(frozen=True)
class Index:
    """The row groups of one split, files in the order of their base names. Sample id = row number in that order."""

    files: tuple[str, ...]
    file: np.ndarray  # of each row group
    group_in_file: np.ndarray
    rows: np.ndarray
    fingerprint: str  # SHA-256 over base names, rows and footers: the structure, never the path
    spans: np.ndarray | None = None  # int64 (row groups, 2): first byte and end of the image and label columns
    footers: tuple[Footer, ...] = ()  # of each file; whoever reads it reads its own, which is most of an index
    states: tuple[str, ...] = ()  # size and version of each file: a file that changes under a run ends it
    classes_per_group: float | None = None  # at most so many on average, from the footers' smallest and largest labels
    root: str = ""  # the folder of local files
    memory: np.ndarray | None = None  # bytes that the images and labels of each row group take, unpacked
    declared: tuple[str, ...] = ()  # BLAKE3 of each row group's bytes, all columns, if a file beside says so; else ""

    @cached_property
    def samples(self) -> int:
        return int(self.rows.sum())

    @cached_property
    def first_row(self) -> np.ndarray:
        """The id of each row group's first row."""
        return np.concatenate([[0], np.cumsum(self.rows)[:-1]])

    @cached_property
    def content(self) -> Content:
        """What has been read so far: made once, before the first reader is forked from this process."""
        content = Content(len(self.rows))
        content.known[self.rows == 0] = 1  # nobody reads what holds nothing
        return content

    def place(self, group: int) -> str:
        """A row group, for messages."""
        return f"row group {int(self.group_in_file[group])} of {self.files[int(self.file[group])]}"

    def group_of(self, ids: np.ndarray) -> np.ndarray:
        """The row groups in which these samples stand."""
        return np.searchsorted(self.first_row, ids, side="right") - 1


def build_indexes(data: Data, num_classes: int, splits: Sequence[str] = ()) -> tuple[Index, ...]:
    """The indexes of these splits: without any of the training and the validation split.

    Raises:
        RecipeError: the data set, a split, a file or a column is not there or not what the recipe says.
    """
    files = resolve(data)
    try:
        return tuple(_build(files, data, split, num_classes) for split in splits or (data.train_split, data.val_split))
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
    root = os.path.abspath(_folder(data))
    names = tuple(os.path.join(root, os.path.relpath(name, index.root)) for name in index.files)
    source = Source(names[0], data.retry_seconds)
    try:
        states = tuple(map(source.state, names))
        footers = tuple(map(partial(read_footer, source), names, states)) if verify else ()
    except DataError as error:
        raise RecipeError(str(error)) from None
    for file, (raw, there) in enumerate(zip(footers, index.footers)):
        if (here := Footer.of(raw)) != there:
            (groups,) = describe([names[file]], [raw], [states[file]], data)
            ours = sum(group.rows for group in groups), here
            theirs = int(index.rows[index.file == file].sum()), there
            told = [f"{rows:,} rows (footer {footer.sha256[:12]})" for rows, footer in (ours, theirs)]
            raise RecipeError(f"{names[file]} has {told[0]}, rank 0's has {told[1]}: all nodes need the same data")
    return replace(index, files=names, states=states, root=root)


def _folder(data: Data) -> str:
    """`data.path` as a folder; where that holds images, the one beside it in which all of them are packed."""
    beside = packed_beside(path := _path(data))
    return str(beside) if beside and is_whole(beside) else path


def _path(data: Data) -> str:
    return os.path.expanduser(data.place.removeprefix("file://"))


def images_at(data: Data) -> Path | None:
    """The folder at `data.path` if it holds images, which are to be packed beside it."""
    path = _path(data)
    return Path(path) if packed_beside(path) else None


def resolve(data: Data, key: str = "data.path=") -> dict[str, list[str]]:
    """{split: its files in the order of their base names}, of a Hub id, a folder or its address (https://, s3://, ...).

    Args:
        key: what the user gave it as, for errors.

    Raises:
        RecipeError: there is nothing, or no access to it.
    """
    path, named = _folder(data), f"{key}{data.path}"
    local, address = os.path.isdir(path), "://" in path
    if address and ("@" in path or "?" in path):  # it would stand in config.yaml and in logs
        raise RecipeError(
            "data.path holds credentials or a signature: leave them to the file system's own environment variables"
        )
    if path.startswith("hf://datasets/"):  # it would follow the newest commit
        raise RecipeError(f"{named}: give the Hub id alone (owner/name), and a commit or tag as data.revision")
    if local and os.path.samefile(path, os.sep):
        raise RecipeError(f"{named} is the whole machine: name the folder of the data set")
    if local:
        check_path(path, named)
    if not local and not address and not on_the_hub(data):
        raise RecipeError(f"{named}: no such folder")
    if local and not any(name.endswith(".parquet") for _, _, names in os.walk(path) for name in names):
        raise RecipeError(f"{named} holds no .parquet file; if it holds images, `lars new` packs them into some")
    try:
        parts = _files_at(path, data) if address else _files_of(path, data.revision)
    except Exception as error:
        raise RecipeError(_explain_access(data.path, named, error)) from None
    found = {str(split): sorted(map(str, files), key=os.path.basename) for split, files in parts.items()}
    for split, names in found.items():
        twice = [name for name, count in Counter(map(os.path.basename, names)).items() if count > 1]
        if twice:
            two = f"two files named {twice[0]}: sample ids need one order of names"
            raise RecipeError(f"split {split!r} of {named} has {two}")
    return found


def _files_at(address: str, data: Data) -> dict[str, list[str]]:
    files, found = Source(address, data.retry_seconds).files, {}
    for split in (data.train_split, data.val_split):
        if names := files.glob(f"{address.rstrip('/')}/{split}-*.parquet"):
            found[split] = [files.unstrip_protocol(name) for name in names]
    return found


def _files_of(path: str, revision: str | None) -> dict[str, list[str]]:
    """Of a folder or a Hub data set; of the latter, paths that name the commit which is the revision's now."""
    import datasets  # two seconds; not needed by anything that only handles an Index

    return datasets.load_dataset_builder(path, revision=revision).config.data_files or {}


def on_the_hub(data: Data) -> bool:
    """Whether `data.path` is the id of a data set of the Hub, and neither a folder here nor an address."""
    path = _folder(data)
    return not (os.path.isdir(path) or "://" in path or path.startswith((".", "/", "~")) or path.count("/") > 1)


def check_hub(data: Data) -> None:
    """Whether this node's login may read a data set of the Hub.

    Raises:
        RecipeError: it may not, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().auth_check(data.place, repo_type="dataset")
    except Exception as error:
        raise RecipeError(_explain_access(data.path, f"data.path={data.path}", error)) from None


def _explain_access(path: str, named: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError

    chain = causes(error)
    if any(isinstance(e, GatedRepoError) or "is a gated dataset" in str(e) for e in chain):
        return (
            f"{named} is gated: accept its licence at huggingface.co/datasets/{path} while logged in, then "
            "run `hf auth login` (or set HF_TOKEN) on every node"
        )
    if any(isinstance(e, ConnectionError) for e in chain):
        return f"{named}: no folder of that name here, and the Hub cannot be reached"
    return f"{named}: {one_line(next((e for e in chain if isinstance(e, DataError)), error))}"


def _build(files: dict[str, list[str]], data: Data, split: str, num_classes: int) -> Index:
    if split not in files:
        raise RecipeError(f"data.path={data.path} has no split {split!r}: it has {', '.join(sorted(files)) or 'none'}")
    names = files[split]
    source = Source(names[0], data.retry_seconds)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        states = tuple(pool.map(source.state, names))
        footers = tuple(pool.map(partial(read_footer, source), names, states))
    described = describe(names, footers, states, data)
    groups = [(number, *placed) for number, file in enumerate(described) for placed in enumerate(file)]
    if not sum(group.rows for *_, group in groups):
        raise RecipeError(f"split {split!r} of data.path={data.path} has no rows")
    classes = []
    for number, _, group in groups:
        if group.labels:
            check_label_range(*group.labels, num_classes, names[number])
            classes.append(min(group.rows, group.labels[1] - group.labels[0] + 1))
    known = float(np.mean(classes)) if len(classes) == len(groups) else None
    folder = _folder(data)
    root = os.path.abspath(folder) if os.path.isdir(folder) else ""
    file, group_in_file = (np.array([group[column] for group in groups]) for column in (0, 1))
    rows, spans, memory = (np.array([getattr(g, what) for *_, g in groups]) for what in ("rows", "span", "memory"))
    declared = _declared(root, names, described) if root else ()
    digest, ends = hashlib.sha256(), tuple(map(Footer.of, footers))
    for name, raw, file_groups in zip(names, footers, described):
        digest.update(f"{os.path.basename(name)} {sum(g.rows for g in file_groups)} ".encode() + raw)
    structure = digest.hexdigest()
    return Index(tuple(names), file, group_in_file, rows, structure, spans, ends, states, known, root, memory, declared)


def _declared(root: str, names: Sequence[str], described: Sequence[list[Group]]) -> tuple[str, ...]:
    """What a folder's `content.json`, from `lars convert`, says of its row groups; "" of files that it does not name.

    Raises:
        RecipeError: it is no such file, or of other row groups.
    """
    beside, declared = Path(root) / "content.json", []
    if not beside.is_file():
        return ()
    try:
        files = json.loads(beside.read_text())["files"]
        told = [files.get(os.path.relpath(name, root)) for name in names]
        known = [None if entry is None else list(map(str.lower, entry["row_groups_blake3"])) for entry in told]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "remove it, or make it again with `lars convert`"
        raise RecipeError(f"{beside} is damaged ({one_line(error)}): {remedy}") from None
    for name, groups, hashes in zip(names, described, known):
        if hashes is None:
            hashes = ["" for _ in groups]
        if len(hashes) != len(groups):
            counts = f"{len(hashes)} row groups of {os.path.basename(name)}, the file has {len(groups)}"
            raise RecipeError(f"{beside} has {counts}: it is of another file")
        declared += hashes
    return tuple(declared)
