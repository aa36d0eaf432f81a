"""Data that are not what they seem: changed, replaced, damaged, larger inside than outside, or from a tricky server."""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec.config
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest
from blake3 import blake3
from conftest import DEMO, play, start_ranks
from data.server import serve
from promises import promised

from lars.commands.preflight import preflight
from lars.data.index import Index, build_indexes
from lars.data.loader import data_line, evaluation_batches
from lars.data.reader import Reader
from lars.data.source import DataError, Source
from lars.recipe import config
from lars.recipe.keys import Recipe
from lars.recipe.refusal import RecipeError
from lars.run.reading import read_result

RECIPE = DEMO / "resnet50.yaml"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def images_of(rows: int) -> list[dict]:
    return (
        pq.read_table(DEMO / "data/train-00000-of-00005.parquet", columns=["image"]).slice(0, rows)["image"].to_pylist()
    )


def write(folder: Path, images: list | None = None, labels: list | None = None, rows: int = 20, **how) -> Path:
    """Both splits of a small data set, plain and uncompressed, row groups of 10."""
    images = images_of(rows) if images is None else images
    labels = [i % 10 for i in range(len(images))] if labels is None else labels
    table = pa.table(
        {
            "image": images if isinstance(images, pa.Array) else pa.array(images, IMAGE),
            "label": pa.array(labels, pa.int64()),
        }
    )
    for split in ("train", "validation"):
        folder.mkdir(exist_ok=True)
        how = {"compression": "none", "use_dictionary": False, "row_group_size": 10, **how}
        pq.write_table(table, folder / f"{split}-0.parquet", **how)
    return folder


def load(path: Path | str, *keys: str) -> Recipe:
    return config.load(RECIPE, [f"data.path={path}", "global_batch=8", "bn_group=4", "runtime.micro_batch=8", *keys])


def permute(file: Path, rows: int = 10, group: int = 0) -> None:
    """Swap two labels of a row group in place; size, footer and time of change stay."""
    content, state = bytearray(file.read_bytes()), file.stat()
    chunk = pq.read_metadata(file).row_group(group).column(2)
    end = chunk.data_page_offset + chunk.total_compressed_size
    first, last = slice(end - 8 * rows, end - 8 * rows + 8), slice(end - 8, end)
    assert content[first] != content[last]
    content[first], content[last] = content[last], content[first]
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def read_all(index: Index, recipe: Recipe) -> tuple[list, np.ndarray]:
    """Images and labels of a split, through a reader of its own."""
    reader = Reader(index, recipe.data, 10, lambda epoch: np.ones(index.samples, bool), needed=0.0)
    (samples,) = reader.samples([(np.arange(index.samples), np.zeros(index.samples, np.int64))])
    return samples.images, samples.labels


def in_a_loader(index: Index, recipe: Recipe) -> None:
    batches = evaluation_batches(index, recipe, 8, range(-(-index.samples // 8)))
    try:
        for _ in batches:
            pass
    finally:
        batches.close()


def keys_of(folder: Path) -> tuple[str, ...]:
    small = (
        "model.kwargs.layers=[1,1,1,1]",
        "global_batch=96",
        "bn_group=4",
        "runtime.micro_batch=48",
        "data.workers=1",
    )
    return (
        f"data.path={folder / 'data'}",
        *small,
        "runtime.portable=false",
        "trackers=[]",
        f"run_dir={folder / 'run'}",
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a run of two steps, which are two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    write(folder / "data", rows=96, row_group_size=48)
    play(1, RECIPE, *keys_of(folder), "max_steps=2", log=folder / "log")
    return folder


# The content of row groups --------------------------------------------------------------------------------------------


@promised(
    "Data",
    ("labels permuted in place between two starts, at 1 process", "the resume stops and names file and row group", 1),
    (
        "labels permuted in place between two starts, at 2 processes",
        "the resume stops, names file and row group, and goes on once they are back",
        2,
    ),
    arguments="processes",
)
def test_a_resume_on_other_labels_stops(processes: int, tmp_path: Path, trained: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before, changed = read_result(tmp_path / "run"), tmp_path / "data/train-0.parquet"
    whole = changed.read_bytes()
    permute(changed, 48, group=1)
    ranks = start_ranks(processes, RECIPE, *keys_of(tmp_path), "max_steps=3", log=tmp_path / "log")
    assert ranks.wait() == [1] * processes, ranks.output
    errors = [line for line in ranks.output.splitlines() if line.startswith("error:")]
    assert (
        len(errors) == 1
        and "row group 1 of" in errors[0]
        and "train-0.parquet has other bytes than when it was read before" in errors[0]
    )
    assert "Traceback" not in ranks.output
    stopped = read_result(tmp_path / "run")
    assert (
        stopped["status"] == "failed"
        and stopped["steps"] == 2
        and (tmp_path / "run/checkpoints/step-00000002").is_dir()
    )
    assert stopped["data_fingerprint"] == before["data_fingerprint"]
    if processes == 2:
        changed.write_bytes(whole)
        play(1, RECIPE, *keys_of(tmp_path), "max_steps=3", log=tmp_path / "log")
        after = read_result(tmp_path / "run")
        assert (
            after["status"] == "finished" and before["content_fingerprint"] == after["content_fingerprint"] is not None
        )


@promised(
    "Data",
    (
        "two nodes with equal footers and other labels",
        "the run stops before the next checkpoint and names both nodes and the row group",
    ),
)
def test_nodes_with_other_bytes_are_named(tmp_path: Path) -> None:
    for rank in "01":
        (tmp_path / rank).mkdir()
        write(tmp_path / rank / "data", rows=96, row_group_size=96)
    permute(tmp_path / "1/data/train-0.parquet", 96)
    keys = (*keys_of(tmp_path)[1:], "data.path=~/data", "max_steps=2")
    ranks = start_ranks(2, RECIPE, *keys, log=tmp_path / "log", first=_Homes(str(tmp_path)))
    assert ranks.wait() == [1, 1], ranks.output
    errors = [line for line in ranks.output.splitlines() if line.startswith("error:")]
    assert (
        len(errors) == 1
        and "row group 0 of" in errors[0]
        and "for rank 1 on" in errors[0]
        and "than for rank 0 on" in errors[0]
    ), ranks.output


class _Homes:
    """Gives each rank a home, as each node has one."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self) -> None:
        os.environ["HOME"] = f"{self.folder}/{os.environ['RANK']}"


@promised(
    "Data",
    ("a row group that changes under a run without a trace in size or time", "it is found when it is read again"),
)
def test_bytes_that_change_between_two_reads(tmp_path: Path) -> None:
    recipe = load(write(tmp_path / "data"))
    _, index = build_indexes(recipe.data, 10)
    in_a_loader(index, recipe)
    in_a_loader(index, recipe)
    assert index.content.read().all()
    permute(tmp_path / "data/validation-0.parquet", group=1)
    with pytest.raises(DataError, match="row group 1 of .*validation-0.parquet has other bytes"):
        in_a_loader(index, recipe)


def declare(folder: Path, **changes: object) -> Path:
    """What `lars.commands.convert` writes beside its files."""
    files = {}
    for file in sorted(folder.glob("*.parquet")):
        metadata, content = pq.read_metadata(file), file.read_bytes()
        hashes = []
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            chunks = [group.column(c) for c in range(group.num_columns)]
            starts = [c.dictionary_page_offset or c.data_page_offset for c in chunks]
            end = max(start + c.total_compressed_size for start, c in zip(starts, chunks))
            hashes.append(blake3(content[min(starts) : end]).hexdigest())
        files[file.name] = {"sha256": hashlib.sha256(content).hexdigest(), "row_groups_blake3": hashes}
    (folder / "content.json").write_text(json.dumps({"files": files} | changes))
    return folder


@promised(
    "Data",
    (
        "a file whose content.json tells another hash of a row group",
        "the first read stops the run and names the row group",
    ),
)
def test_declared_hashes_are_verified(tmp_path: Path) -> None:
    recipe = load(declare(write(tmp_path / "data")))
    _, index = build_indexes(recipe.data, 10)
    in_a_loader(index, recipe)
    permute(tmp_path / "data/validation-0.parquet", group=1)
    with pytest.raises(
        DataError, match="row group 1 of .*validation-0.parquet is not what content.json beside it says"
    ):
        read_all(build_indexes(recipe.data, 10)[1], recipe)


def test_declared_hashes_are_of_all_columns_and_kept_ones_of_those_that_are_read(tmp_path: Path) -> None:
    write(tmp_path / "data")
    for split in ("train", "validation"):
        table = pq.read_table(tmp_path / f"data/{split}-0.parquet")
        table = table.add_column(0, "before", pa.array(range(20))).append_column("after", pa.array(range(20)))
        pq.write_table(table, tmp_path / f"data/{split}-0.parquet", row_group_size=10, compression="none")
    recipe, kept = load(tmp_path / "data"), []
    for _ in range(2):
        _, index = build_indexes(recipe.data, 10)
        read_all(index, recipe)
        kept.append(index.content.read())
        declare(tmp_path / "data")
    assert np.array_equal(*kept) and index.declared[0]


def test_a_row_group_without_rows_leaves_nothing_to_read(tmp_path: Path) -> None:
    write(tmp_path / "data")
    for file in (tmp_path / "data").iterdir():
        table = pq.read_table(file)
        with pq.ParquetWriter(file, table.schema) as writer:
            for part in (table.slice(0, 10), table.slice(0, 0), table.slice(10, 10)):
                writer.write_table(part)
    recipe = load(tmp_path / "data")
    _, index = build_indexes(recipe.data, 10)
    read_all(index, recipe)
    assert index.rows.tolist() == [10, 0, 10] and index.content.read()[:, 0].all()


@promised(
    "Data",
    ("a content.json that is garbage", "refused", "garbage{", "content.json is damaged"),
    ("a content.json that is a list", "refused", "[]", "content.json is damaged"),
    (
        "a content.json of row groups that are numbers",
        "refused",
        '{"files": {"train-0.parquet": {"row_groups_blake3": [1, 2]}}}',
        "content.json is damaged",
    ),
    (
        "a content.json of another file",
        "refused",
        '{"files": {"train-0.parquet": {"row_groups_blake3": ["00"]}}}',
        "has 1 row groups of train-0.parquet",
    ),
    arguments="text, words",
)
def test_a_damaged_content_file(text: str, words: str, tmp_path: Path) -> None:
    (write(tmp_path / "data") / "content.json").write_text(text)
    with pytest.raises(RecipeError, match=words):
        build_indexes(load(tmp_path / "data").data, 10)


def test_a_content_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At ImageNet's size it has a megabyte, and there are 294 files."""
    write(tmp_path / "data")
    for number in (1, 2):
        shutil.copy(tmp_path / "data/train-0.parquet", tmp_path / f"data/train-{number}.parquet")
    recipe, read, reads = load(declare(tmp_path / "data")), json.loads, []
    monkeypatch.setattr(json, "loads", lambda text: (reads.append(text), read(text))[1])
    (train,) = build_indexes(recipe.data, 10, ("train",))
    assert len(train.declared) == 6 and all(train.declared)
    assert reads.count((tmp_path / "data/content.json").read_text()) == 1


@promised("Data", ("a page whose bytes do not fit its checksum", "the run stops and names the row group"))
def test_page_checksums_are_verified(tmp_path: Path) -> None:
    recipe = load(write(tmp_path / "data", write_page_checksum=True))
    permute(tmp_path / "data/validation-0.parquet")
    with pytest.raises(
        DataError, match="row group 0 of .*validation-0.parquet cannot be read, the file is damaged.*checksum"
    ):
        read_all(build_indexes(recipe.data, 10)[1], recipe)


# Servers --------------------------------------------------------------------------------------------------------------


@promised(
    "Servers",
    (
        "a remote file of the same size that changes during a run, on a server with strong ETags",
        "the next read stops the run at once",
    ),
)
def test_a_strong_etag_is_a_condition_of_every_read(tmp_path: Path) -> None:
    write(tmp_path / "data")
    with serve(tmp_path / "data") as (address, log):
        recipe = load(address)
        _, index = build_indexes(recipe.data, 10)
        source = Source(index.files[0], 5)
        assert len(source.read(index.files[0], 4, 8, index.states[0])) == 4
        os.utime(tmp_path / "data/validation-0.parquet", ns=(1, 1))
        asked = len(log)
        with pytest.raises(DataError, match="validation-0.parquet has changed since the run began"):
            source.read(index.files[0], 4, 8, index.states[0])
        assert len(log) == asked + 1


@promised(
    "Servers",
    (
        "a remote file that changes during a run, on a server with weak ETags",
        "its state is asked again once a minute, a change stops the run",
        "weak",
    ),
    (
        "a remote file that changes during a run, on a server without ETags",
        "its time of change is asked again once a minute",
        "none",
    ),
    arguments="etag",
)
def test_elsewhere_the_state_is_asked_again(etag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data")
    heard: list[dict[str, str]] = []
    with serve(tmp_path / "data", etag=etag, heard=heard) as (address, _):
        recipe = load(address)
        _, index = build_indexes(recipe.data, 10)
        reader = Reader(index, recipe.data, 10, lambda epoch: np.ones(20, bool), needed=0.0)
        reader.source = Source(index.files[0], 60)
        reader._read(0)
        before = sum(request["method"] == "HEAD" for request in heard)
        reader._read(0)
        assert sum(request["method"] == "HEAD" for request in heard) == before  # not with every read
        os.utime(tmp_path / "data/validation-0.parquet", (1, 1))
        monkeypatch.setattr("lars.data.reader._ASK_AGAIN", -1.0)
        with pytest.raises(DataError, match="validation-0.parquet has changed since the run began"):
            reader._read(0)


def test_files_of_the_hub_are_read_at_a_commit() -> None:
    place = "hf://datasets/somebody/images@0123456789abcdef0123456789abcdef01234567/data/train-0.parquet"
    assert Source(place, 1).settled("12 blob") and not Source("memory://data", 1).settled("12 2026-01-01")


@promised("Servers", ("a server without ranges", "refused at once, and not a whole file is fetched"))
def test_a_server_that_ignores_ranges_is_told_at_once(tmp_path: Path) -> None:
    write(tmp_path / "data")
    with serve(tmp_path / "data", ranges=False) as (address, log):
        with pytest.raises(RecipeError, match="the server ignores ranges"):
            build_indexes(load(address, "data.retry_seconds=5").data, 10)
        assert len(log) <= 2  # one of each file that is asked for at the same time


@promised(
    "Servers",
    ("a redirect from http to https", "refused at once, with the new address", "https://127.0.0.1:1/train-0.parquet"),
    ("a redirect to ftp", "refused at once", "ftp://127.0.0.1/train-0.parquet"),
    ("a redirect to a file", "refused at once", "file:///etc/passwd"),
    arguments="target",
)
def test_a_redirect_to_another_scheme(target: str, tmp_path: Path) -> None:
    write(tmp_path / "data")
    with serve(tmp_path / "data", redirect=lambda path: target if "parquet" in path else None) as (address, log):
        with pytest.raises(RecipeError, match="redirects to another scheme") as error:
            build_indexes(load(address, "data.retry_seconds=5").data, 10)
    assert target in str(error.value) and not log


SECRETS = {
    "an Authorization header": {"headers": {"Authorization": "Bearer secret"}},
    "a header X-Api-Key": {"headers": {"X-Api-Key": "secret"}},
    "a header of the session": {"client_kwargs": {"headers": {"X-Api-Key": "secret"}}},
    "a cookie": {"client_kwargs": {"cookies": {"token": "secret"}}},
    "a name and a password": {"client_kwargs": {"auth": ["me", "secret"]}},
    "an entry of netrc": {"client_kwargs": {"trust_env": True}},
}


@promised(
    "Servers",
    *(
        (f"a redirect to another host, with {how} configured for fsspec", "the other host does not see it", how)
        for how in SECRETS
    ),
    arguments="how",
)
def test_credentials_never_follow_to_another_host(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data")
    (tmp_path / "netrc").write_text("machine localhost login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setitem(fsspec.config.conf, "http", SECRETS[how])
    theirs: list[dict[str, str]] = []
    ours: list[dict[str, str]] = []
    with serve(tmp_path / "data", heard=theirs) as (there, _):
        with serve(
            tmp_path / "data", heard=ours, redirect=lambda path: there + path if "parquet" in path else None
        ) as (here, _):
            build_indexes(load(here.replace("127.0.0.1", "localhost")).data, 10)
    secrets = ("secret", base64.b64encode(b"me:secret").decode())
    assert all(any(secret in str(request) for secret in secrets) for request in ours)
    assert theirs and not any(secret in str(request) for request in theirs for secret in secrets)
    assert any("Range" in request and "If-Match" in request for request in theirs)


# Memory ---------------------------------------------------------------------------------------------------------------


@promised("Data", ("a small file with much inside, for which there is no memory", "refused with the numbers"))
def test_a_row_group_that_takes_more_than_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path / "data",
        images=[{"bytes": bytes([i]) * 4_000_000, "path": None} for i in range(10)],
        compression="zstd",
    )
    assert (tmp_path / "data/train-0.parquet").stat().st_size < 20_000
    recipe = load(tmp_path / "data")
    train, _ = build_indexes(recipe.data, 10)
    assert 40_000_000 <= train.memory[0] < 41_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "20000")  # so many share the memory of this machine
    with pytest.raises(
        RecipeError, match="row group 0 of .* takes 38 MiB of memory, of which a process may have [01] MiB"
    ):
        preflight(recipe, "plain", 1)


def test_the_start_tells_the_memory_of_what_is_inside(tmp_path: Path) -> None:
    from lars.recipe.batch import BatchPlan

    write(
        tmp_path / "data",
        images=[{"bytes": bytes([i]) * 4_000_000, "path": None} for i in range(10)],
        compression="zstd",
    )
    recipe = load(tmp_path / "data", "epochs=20")
    train, _ = build_indexes(recipe.data, 10)
    assert "holds up to 38 MiB" in data_line(recipe, train, BatchPlan.of(recipe, 10, 1))


@promised("Data", ("a row group in which one image stands a thousand times", "it takes the memory of one"))
def test_an_image_that_is_repeated_takes_its_memory_once(tmp_path: Path) -> None:
    recipe = load(
        write(
            tmp_path / "data",
            images=[{"bytes": b"x" * 100_000, "path": None}] * 1000,
            use_dictionary=True,
            row_group_size=1000,
        )
    )
    _, index = build_indexes(recipe.data, 10)
    images, _ = read_all(index, recipe)
    assert index.memory[0] < 1_000_000 and len(images) == 1000 and len({id(image) for image in images}) == 1


# Parquet --------------------------------------------------------------------------------------------------------------


class _Keys(encryption.KmsClient):
    def __init__(self, configuration: object) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, name: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, key: bytes, name: str) -> bytes:
        return base64.b64decode(key)


def encrypt(plaintext_footer: bool) -> Callable[[Path], None]:
    def write_encrypted(file: Path) -> None:
        table = pq.read_table(file)
        how = encryption.EncryptionConfiguration(
            footer_key="f", column_keys={"k": ["image.bytes"]}, plaintext_footer=plaintext_footer
        )
        keys = encryption.CryptoFactory(_Keys).file_encryption_properties(encryption.KmsConnectionConfig(), how)
        with pq.ParquetWriter(file, table.schema, encryption_properties=keys) as writer:
            writer.write_table(table)

    return write_encrypted


def with_columns(**columns: pa.Array) -> Callable[[Path], None]:
    return lambda file: pq.write_table(pa.table(columns), file)


def twice(file: Path) -> None:
    table = pq.read_table(file)
    pq.write_table(pa.table([*table.columns, table["label"]], names=["image", "label", "label"]), file)


def without_the_middle(file: Path) -> None:
    """As a download that was resumed at a wrong place leaves it: a whole footer, and bytes missing before it."""
    content = file.read_bytes()
    file.write_bytes(content[:1_000] + content[-8 - int.from_bytes(content[-8:-4], "little") :])


def without_a_signature(file: Path) -> None:
    """Encrypted columns that nothing else betrays: pyarrow ends its process over them."""
    encrypt(True)(file)
    content = file.read_bytes()
    length = int.from_bytes(content[-8:-4], "little") - 28
    file.write_bytes(content[: -8 - 28] + length.to_bytes(4, "little") + b"PAR1")


def renamed(file: Path) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[-8:-4], "little") + 8
    file.write_bytes(content[:-length] + content[-length:].replace(b"path", b"p\xffth"))


def nulls(rows: int) -> pa.Array:
    return pa.array([None if i == 3 else 1 for i in range(rows)], pa.int64())


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "null labels": (
        with_columns(image=pa.array([{"bytes": b"x"}] * 5), label=nulls(5)),
        "1 labels in row group 0 of .* are null",
    ),
    "images as text": (with_columns(image=pa.array([{"bytes": "x"}] * 5), label=pa.array([1] * 5)), "not an image"),
    "images as lists of numbers": (
        with_columns(image=pa.array([{"bytes": [1, 2]}] * 5), label=pa.array([1] * 5)),
        "not an image",
    ),
    "images that are no struct": (with_columns(image=pa.array([b"x"] * 5), label=pa.array([1] * 5)), "not an image"),
    "two columns of one name": (twice, "has several columns data.label_column=label"),
    "encrypted columns": (encrypt(True), "has encrypted columns, and no key can be given"),
    "a column name that is no text": (renamed, "is not a readable Parquet file: .*decode"),
    "an encrypted footer": (encrypt(False), "is encrypted, and no key can be given"),
    "bytes missing before the footer": (without_the_middle, "is damaged or cut off: row group 0 should lie at bytes"),
    "half of the file": (lambda file: os.truncate(file, file.stat().st_size // 2), "is not a Parquet file"),
    "no bytes": (lambda file: os.truncate(file, 0), "is not a Parquet file"),
}


@promised("Parquet", *((f"a file with {what}", "refused", what) for what in DAMAGED), arguments="what")
def test_a_parquet_file_of_another_kind(what: str, tmp_path: Path) -> None:
    damage, words = DAMAGED[what]
    damage(write(tmp_path / "data") / "train-0.parquet")
    with pytest.raises(RecipeError, match=words) as error:
        build_indexes(load(tmp_path / "data").data, 10)
    assert "\n" not in str(error.value)


@promised(
    "Parquet",
    ("a file with encrypted columns that nothing else betrays, over which pyarrow ends its process", "refused"),
)
def test_a_footer_that_pyarrow_does_not_survive(tmp_path: Path) -> None:
    without_a_signature(write(tmp_path / "data") / "train-0.parquet")

    def refused() -> None:
        with pytest.raises(
            RecipeError, match="train-0.parquet is not a readable Parquet file: pyarrow breaks down over its footer"
        ):
            build_indexes(load(tmp_path / "data").data, 10)

    process = multiprocessing.get_context("fork").Process(target=refused)  # not the one of the tests
    process.start()
    process.join()
    assert process.exitcode == 0


@promised(
    "Parquet", ("null labels that the footer does not tell", "the run stops with the same line when they are read")
)
def test_null_labels_without_statistics(tmp_path: Path) -> None:
    recipe = load(write(tmp_path / "data", labels=[None if i == 13 else 1 for i in range(20)], write_statistics=False))
    _, index = build_indexes(recipe.data, 10)
    with pytest.raises(RecipeError, match="1 labels in row group 1 of .*validation-0.parquet are null"):
        read_all(index, recipe)


@promised("Parquet", ("20 footers with one to four bytes changed", "read, or refused in one line"))
def test_mutated_footers(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    recipe, rng, told = load(write(tmp_path / "data")), random.Random(0), []
    file = tmp_path / "data/train-0.parquet"
    whole = file.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little")
    for _ in range(20):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 4])):
            content[len(whole) - 8 - length + rng.randrange(length)] = rng.randrange(256)
        file.write_bytes(content)
        try:
            build_indexes(recipe.data, 10)
        except RecipeError as error:
            told.append(str(error))
    assert told and not any("\n" in line for line in told)
    assert capfd.readouterr().err == ""


@promised(
    "Data",
    ("data.path=file:///none", "refused", "file:///none", "no such folder"),
    ("data.path=/", "refused, without looking through the machine", "/", "the whole machine"),
    ("data.path=//", "refused, without looking through the machine", "//", "the whole machine"),
    ("data.path=file:///", "refused, without looking through the machine", "file:///", "the whole machine"),
    (
        "data.path=hf://datasets/owner/name, which would follow new commits",
        "refused",
        "hf://datasets/owner/name",
        "data.revision",
    ),
    arguments="path, words",
)
def test_a_path_that_is_no_data_set(path: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build_indexes(load(path).data, 10)


@promised("Data", ("data.path=file:///a/folder", "is that folder"))
def test_a_folder_may_be_given_as_an_address(tmp_path: Path) -> None:
    write(tmp_path / "data")
    train, _ = build_indexes(load(f"file://{tmp_path / 'data'}").data, 10)
    assert train.root == str(tmp_path / "data") and train.samples == 20


@promised("Data", ("a local file that is cut while it is read", "the run stops at once, not after data.retry_seconds"))
def test_a_local_file_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="file.bin ends 50 bytes before byte 150: it is cut off"):
        Source(str(tmp_path / "file.bin"), 1).read(str(tmp_path / "file.bin"), 0, 150)
