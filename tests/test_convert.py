"""Local copies in the Hub's schema: every image once, the same bytes after any kill, the Hub's fingerprint."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from conftest import DEMO, ROOT, wait_until
from PIL import Image

from lars.commands.convert import main
from lars.data import source
from lars.data.index import build_indexes, fingerprint
from lars.data.loader import training_batches
from lars.data.order import Order
from lars.recipe import config

WNIDS = ["n01440764", "n01443537", "n01484850", "n02000000"]


def image(seed: int, size: tuple[int, int] = (40, 30), format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def samples(count: int, split: str, **kind) -> dict[str, tuple[str, bytes]]:
    """{name: (wnid, bytes)}, named as ILSVRC2012 does."""
    found = {}
    for number in range(1, count + 1):
        wnid = WNIDS[number * 7 % 4]
        found[f"{wnid}_{number}.JPEG" if split == "train" else f"ILSVRC2012_val_{number:08d}.JPEG"] = (
            wnid,
            image(number, **kind),
        )
    return found


def write_folder(folder: Path, train: dict[str, tuple[str, bytes]], val: dict[str, tuple[str, bytes]]) -> Path:
    for split, images in (("train", train), ("val", val)):
        for name, (wnid, data) in images.items():
            (folder / split / wnid).mkdir(parents=True, exist_ok=True)
            (folder / split / wnid / name).write_bytes(data)
    return folder


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.parquet")}


def fingerprint_of(folder: Path, classes: int = 10) -> str:
    return fingerprint(*build_indexes(config.load(DEMO / "resnet50.yaml", [f"data.path={folder}"]).data, classes))


def refusal(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line on stderr of a start that ends with status 2."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.fixture(scope="module")
def images() -> tuple[dict[str, tuple[str, bytes]], dict[str, tuple[str, bytes]]]:
    return samples(503, "train", size=(70, 60), format="PNG"), samples(37, "validation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), *images)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    assert main([str(folder), str(out), "--file-mb", "2", "--workers", "2"]) == 0
    return out


def test_a_folder_becomes_the_hubs_schema(converted: Path, images, tmp_path: Path) -> None:
    names = [f"train-{n:05d}-of-00003.parquet" for n in range(3)] + ["validation-00000-of-00001.parquet"]
    assert sorted(content(converted)) == names
    footers = [pq.read_metadata(converted / name) for name in names[:3]]
    assert [f.row_group(g).num_rows for f in footers for g in range(f.num_row_groups)] == [100] * 5 + [3]
    loaded = datasets.load_dataset(str(converted), cache_dir=str(tmp_path))
    for split, expected in zip(("train", "validation"), images):
        assert loaded[split].features["label"] == datasets.ClassLabel(names=WNIDS)
        assert isinstance(loaded[split].features["image"], datasets.Image)
        raw = loaded[split].cast_column("image", datasets.Image(decode=False))
        rows = {row["image"]["path"]: (WNIDS[row["label"]], row["image"]["bytes"]) for row in raw}
        assert rows == expected and len(raw) == len(expected)


def test_training_rows_are_not_sorted_by_class(converted: Path) -> None:
    for file in converted.glob("train-*.parquet"):
        labels = pq.read_table(file, columns=["label"])["label"].to_numpy()
        assert (np.diff(labels) != 0).mean() > 0.6  # 3/4 by chance, 0 in class order


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory, images) -> Path:
    folder, (train, val) = tmp_path_factory.mktemp("tars"), images
    inner = {
        f"{w}.tar": tar_of({name: data for name, (wnid, data) in train.items() if wnid == w}) for w in reversed(WNIDS)
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of({name: data for name, (_, data) in reversed(val.items())}))
    return folder


def write_devkit(folder: Path, val: dict[str, tuple[str, bytes]]) -> None:
    """With ids that are not in the order of the wnids, and an inner node of the tree, as in the real one."""
    ids = {WNIDS[i]: n for n, i in enumerate((2, 0, 3, 1), 1)}
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = np.zeros((5, 1), kinds)
    for row, (wnid, number) in enumerate({**ids, "n00001740": 1001}.items()):
        synsets[row, 0] = (number, wnid, f"words of {wnid}", "gloss", 3 if number > 1000 else 0)
    matlab = io.BytesIO()
    scipy.io.savemat(matlab, {"synsets": synsets})
    truth = "".join(f"{ids[val[name][0]]}\n" for name in sorted(val)).encode()
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        for name, data in (("ILSVRC2012_validation_ground_truth.txt", truth), ("meta.mat", matlab.getvalue())):
            member = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_the_tars_give_the_files_that_the_unpacked_folder_gives(
    tars: Path, converted: Path, images, tmp_path: Path, capsys
) -> None:
    val = images[1]
    assert "ILSVRC2012_devkit_t12.tar.gz" in refusal(capsys, str(tars), str(tmp_path / "none"))
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        + "".join(f"{name[:-5]},{wnid} 1 2 3 4 {wnid} 5 6 7 8\n" for name, (wnid, _) in val.items())
    )
    (tmp_path / "plain.txt").write_text("".join(f"{name} {wnid}\n" for name, (wnid, _) in val.items()))
    for labels in ("LOC_val_solution.csv", "plain.txt"):
        out = tmp_path / f"with-{labels}"
        assert main([str(tars), str(out), "--file-mb", "2", "--val-labels", str(tmp_path / labels)]) == 0
        assert content(out) == content(converted)
    write_devkit(tars, val)
    assert main([str(tars), str(tmp_path / "devkit"), "--split", "validation"]) == 0
    name = "validation-00000-of-00001.parquet"
    assert content(tmp_path / "devkit") == {name: content(converted)[name]}


def test_damaged_tars_and_labels_of_other_images_are_refused(tars: Path, tmp_path: Path, capsys) -> None:
    whole = (tars / "ILSVRC2012_img_train.tar").read_bytes()
    for cut in (len(whole) // 2, 700):
        (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(whole[:cut])
        assert "fetch it again" in refusal(capsys, str(tmp_path), str(tmp_path / "out"), "--split", "train")
    inner = tar_of({"n01440764_1.JPEG": bytes(5000)})
    for cut in (2048, 5632):  # inside the image, and after it: the next header is the outer tar's
        (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(
            tar_of({"n01440764.tar": inner[:cut], "n01443537.tar": inner})
        )
        assert "cut off" in refusal(capsys, str(tmp_path), str(tmp_path / "out"), "--split", "train")
    (tmp_path / "other.txt").write_text("ILSVRC2012_val_00000001 n01440764\n")
    assert "has no label" in refusal(
        capsys, str(tars), str(tmp_path / "out"), "--val-labels", str(tmp_path / "other.txt")
    )


class Server(ThreadingHTTPServer):
    """Serves a folder with byte ranges, as the Hub's storage does; `before` may misbehave first."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.ranges: list[tuple[str, int]] = []
        self.before: Callable[[Handler, int], bool] = lambda handler, start: False
        super().__init__(("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(folder)))
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked:
            return super().do_GET()
        start, last = map(int, asked.groups())
        self.server.ranges.append((self.path[1:], start))
        if self.server.before(self, start):
            return None
        data = Path(self.translate_path(self.path)).read_bytes()[start : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/*")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the demo's files, and one of 40 MB: three pieces."""
    folder = tmp_path_factory.mktemp("originals")
    for name in ("train-00000-of-00005", "validation-00000-of-00001"):
        table = pq.read_table(DEMO / "data" / f"{name}.parquet").slice(0, 300)
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=70)
    kind = table.schema.field("image").type
    large = [{"bytes": os.urandom(400_000), "path": f"{i}.jpg"} for i in range(100)]
    table = pa.table([pa.array(large, kind), pa.array([i % 10 for i in range(100)])], schema=table.schema)
    pq.write_table(table, folder / "train-00001-of-00005.parquet", compression="NONE", use_dictionary=False)
    return folder


@pytest.fixture
def server(originals: Path) -> Iterator[Server]:
    server = Server(originals)
    yield server
    server.shutdown()
    server.server_close()


def test_copied_parquet_keeps_bytes_and_fingerprint(originals: Path, tmp_path: Path) -> None:
    assert main([str(originals), str(tmp_path / "out")]) == 0
    assert content(tmp_path / "out") == content(originals)
    assert fingerprint_of(tmp_path / "out") == fingerprint_of(originals)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
        return True
    except ProcessLookupError:
        return False


def kill(pid: int, wait: Callable[[], int]) -> None:
    """SIGKILL to the leader of a process group alone; its workers must end with it."""
    os.kill(pid, signal.SIGKILL)
    wait()
    wait_until(lambda: not alive(pid), 10)


def lead_a_group(*arguments: str) -> None:
    os.setsid()
    main(list(arguments))


def test_a_copy_over_http_goes_on_where_it_was_killed(server: Server, originals: Path, tmp_path: Path) -> None:
    name, hold = "train-00001-of-00005.parquet", threading.Event()

    def stall(handler: Handler, start: int) -> bool:
        return handler.path.endswith(name) and start > 20e6 and hold.wait(60)

    server.before = stall
    process = multiprocessing.get_context("fork").Process(
        target=lead_a_group, args=(server.address, str(tmp_path))
    )  # imports nothing anew
    process.start()
    piece = 16 * 2**20
    wait_until(lambda: (name, 2 * piece) in server.ranges)
    kill(process.pid, process.join)
    hold.set()
    (part,) = tmp_path.glob(f".convert/train.{name}.*.part")
    assert part.stat().st_size == 2 * piece
    with part.open("ab") as file:  # as if the kill had come in the middle of a piece
        file.truncate(piece + 12345)
    server.ranges.clear()
    failures = iter([500])

    def fail(handler: Handler, start: int) -> bool:
        status = next(failures, None) if handler.path.endswith(name) else None
        if status:
            handler.send_error(status)
        return bool(status)

    server.before = fail
    assert main([server.address, str(tmp_path)]) == 0
    assert [at for file, at in server.ranges if file == name] == [piece + 12345] * 2 + [2 * piece + 12345]
    assert content(tmp_path) == content(originals)
    assert fingerprint_of(tmp_path) == fingerprint_of(originals)
    assert not list(tmp_path.glob(".*"))


def test_another_version_at_the_source_is_never_mixed_in(originals: Path, tmp_path: Path, capsys) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for file, data in content(originals).items():
        (folder / file).write_bytes(data)
    assert main([str(folder), str(out)]) == 0
    name = "validation-00000-of-00001.parquet"
    (out / name).unlink()
    (out / ".convert").mkdir()
    (out / ".convert" / f"validation.{name}.{'0' * 16}.part").write_bytes(b"of an older version")
    table = pq.read_table(folder / name)
    pq.write_table(table.slice(0, 200), folder / name)
    assert main([str(folder), str(out)]) == 0
    assert content(out) == content(folder) and not list(out.glob(".*"))
    pq.write_table(table, folder / name)
    assert "has changed in its source" in refusal(capsys, str(folder), str(out))


def test_damage_on_the_way_is_found_and_fetched_anew(originals: Path, tmp_path: Path, capsys) -> None:
    assert main([str(originals), str(tmp_path)]) == 0
    target = tmp_path / "validation-00000-of-00001.parquet"
    state = json.loads((tmp_path / "convert.json").read_text())["states"][target.name]
    target.unlink()
    (tmp_path / ".convert").mkdir()
    part = tmp_path / ".convert" / f"validation.{target.name}.{hashlib.sha256(state.encode()).hexdigest()[:16]}.part"
    part.write_bytes(bytes(int(state.split()[0])))
    capsys.readouterr()
    assert main([str(originals), str(tmp_path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1 and not target.exists()
    assert main([str(originals), str(tmp_path)]) == 0
    assert content(tmp_path) == content(originals)


def test_a_told_sha256_is_compared(originals: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from fsspec.implementations.local import LocalFileSystem

    info = LocalFileSystem.info
    monkeypatch.setattr(
        LocalFileSystem, "info", lambda self, path, **kw: {**info(self, path, **kw), "lfs": {"sha256": "0" * 64}}
    )
    assert main([str(originals), str(tmp_path)]) == 1
    assert "came damaged" in capsys.readouterr().err and not content(tmp_path)


def test_resized_images_train_and_have_their_own_fingerprint(tmp_path: Path, capsys) -> None:
    big, bad = samples(120, "train", size=(90, 64)), samples(12, "validation", size=(20, 20))
    bad["broken.JPEG"] = WNIDS[0], b"no image"
    folder = write_folder(tmp_path / "in", big, bad)
    assert main([str(folder), str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    assert main([str(folder), str(tmp_path / "small"), "--resize", "32", "--quality", "80"]) == 0
    assert "1 images cannot be decoded and were kept as they are (broken.JPEG)" in capsys.readouterr().err
    assert main([str(tmp_path / "whole"), str(tmp_path / "again"), "--resize", "32", "--quality", "80"]) == 0
    assert content(tmp_path / "small") == content(tmp_path / "again")
    rows = pq.read_table(tmp_path / "small/train-00000-of-00001.parquet")["image"].to_pylist()
    opened = [Image.open(io.BytesIO(row["bytes"])) for row in rows]
    assert {(i.size, i.format) for i in opened} == {((45, 32), "JPEG")}
    rows = pq.read_table(tmp_path / "small/validation-00000-of-00001.parquet")["image"].to_pylist()
    assert {row["path"]: row["bytes"] for row in rows} == {name: data for name, (_, data) in bad.items()}
    assert fingerprint_of(tmp_path / "small", 4) != fingerprint_of(tmp_path / "whole", 4)
    overrides = [
        "global_batch=8",
        "bn_group=4",
        "epochs=10",
        "runtime.micro_batch=8",
        f"data.path={tmp_path / 'small'}",
    ]
    recipe = config.load(DEMO / "resnet50.yaml", overrides)
    index, _ = build_indexes(recipe.data, 10)
    batches = training_batches(Order(index, 0, 8, 4), index, recipe, [range(8)], 0, 1)
    assert next(batches).bad == 0
    batches.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_and_restarted_gives_the_same_bytes(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    options = ["--file-mb", "2", "--resize", "50"]
    assert main([str(folder), str(tmp_path / "straight"), *options]) == 0
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "lars", "convert", str(folder), str(out), *options, "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(content(out)) >= 1 and any(out.glob(".convert/*.tmp")))
    if number == signal.SIGTERM:
        process.send_signal(number)
        assert "stopped; start the same command again to go on\n" in process.communicate()[1]
        assert process.returncode == 75
    else:
        kill(process.pid, process.wait)
    done = {p: p.stat().st_mtime_ns for p in out.glob("*.parquet")}
    assert 0 < len(done) < 4
    assert main([str(folder), str(out), *options]) == 0
    assert content(out) == content(tmp_path / "straight")
    assert all(p.stat().st_mtime_ns == then for p, then in done.items())
    assert not list(out.glob(".*"))


def test_other_options_or_another_source_are_refused(
    folder: Path, converted: Path, images, tmp_path: Path, capsys
) -> None:
    before = content(converted)
    assert main([str(folder), str(converted), "--file-mb", "2"]) == 0
    assert "resize=None, not 32" in refusal(capsys, str(folder), str(converted), "--file-mb", "2", "--resize", "32")
    assert "file_mb=2, not 500" in refusal(capsys, str(folder), str(converted))
    assert "split=" in refusal(capsys, str(folder), str(converted), "--file-mb", "2", "--split", "train")
    train = dict(images[0])
    name, (_, data) = train.popitem()
    train[f"other_{name}"] = WNIDS[0], data
    other = write_folder(tmp_path / "other", train, images[1])
    assert "other images" in refusal(capsys, str(other), str(converted), "--file-mb", "2")
    (converted / "convert.json").rename(tmp_path / "kept.json")
    try:
        assert "no conversion" in refusal(capsys, str(folder), str(converted), "--file-mb", "2")
    finally:
        (tmp_path / "kept.json").rename(converted / "convert.json")
    assert content(converted) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{folder}"], "OUT"),
        (["{folder}", "{out}", "--resize", "big"], "--resize"),
        (["{folder}", "{out}", "--resize", "0"], "1 or more"),
        (["{folder}", "{out}", "--workers", "0"], "1 or more"),
        (["{folder}", "{out}", "--quality", "80"], "--quality"),
        (["{folder}", "{out}", "--resize", "32", "--quality", "101"], "1 to 100"),
        (["{folder}", "{out}", "--val-labels", "x"], "--val-labels"),
        (["{folder}", "{out}", "--split", "test"], "--split"),
        (["{out}/nowhere", "{out}"], "no such folder"),
        (["{demo}", "{demo}/copy"], "lies in SOURCE"),
        (["{demo}", "{out}", "--file-mb", "3"], "--file-mb"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], words: str, folder: Path, tmp_path: Path, capsys
) -> None:
    places = {"folder": folder, "out": tmp_path / "out", "demo": DEMO / "data"}
    assert words in refusal(capsys, *(argument.format(**places) for argument in arguments))
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_fit_are_refused(tmp_path: Path, capsys) -> None:
    folder, out = write_folder(tmp_path / "in", samples(8, "train"), {}), str(tmp_path / "out")
    assert "no folder val or validation" in refusal(capsys, str(folder), out)
    (folder / "val" / "n09999999").mkdir(parents=True)
    assert "n09999999" in refusal(capsys, str(folder), out)
    (folder / "train" / "n09999999").mkdir()
    assert "holds no image" in refusal(capsys, str(folder), out)


def test_an_unreadable_original_is_one_line_and_status_1(originals: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        source.Source, "read", lambda *_: (_ for _ in ()).throw(source.DataError("file cannot be read"))
    )
    assert main([str(originals), str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines() == ["error: file cannot be read: start the same command again to go on"]
