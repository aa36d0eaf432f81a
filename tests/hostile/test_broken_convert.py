"""`lars.commands.convert`: no image is missing unseen, nothing of the user's is touched, and a mistake is one line."""

from __future__ import annotations

import base64
import faulthandler
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from blake3 import blake3
from promises import promised
from test_convert import WNIDS, content, image, refusal, tar_of, write_devkit

from lars.commands.convert import main, pack
from lars.data.index import resolve
from lars.data.originals import Row
from lars.recipe.keys import Data
from lars.recipe.refusal import RecipeError
from lars.run.lock import RunLock

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
PARQUET = ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet")


def small_folder(at: Path) -> Path:
    """Three training images and a validation image of each of two classes."""
    for split, count in (("train", 3), ("val", 1)):
        for label, name in enumerate(("cat", "dog")):
            (at / split / name).mkdir(parents=True)
            for number in range(count):
                (at / split / name / f"{split}{number}.jpg").write_bytes(image(10 * label + number))
    return at


def rows(out: Path) -> dict[str, list[tuple[str, int]]]:
    """{split: (name, label) of every image, sorted}."""
    tables = {split: pq.read_table(out / file).to_pylist() for split, file in zip(("train", "validation"), PARQUET)}
    return {split: sorted((row["image"]["path"], row["label"]) for row in table) for split, table in tables.items()}


def untouched(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_folder(tmp_path / "in")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# ---- what an image folder holds


def loop(folder: Path) -> None:
    (folder / "train/cat/again").symlink_to("../..")


def outside(folder: Path) -> None:
    (folder.parent / "elsewhere.jpg").write_bytes(image(99))
    (folder / "train/cat/more.jpg").symlink_to(folder.parent / "elsewhere.jpg")


def linked_class(folder: Path) -> None:
    (folder / "train/eel").symlink_to("cat")


def linked_split(folder: Path) -> None:
    (folder / "train").rename(folder.parent / "elsewhere")
    (folder / "train").symlink_to(folder.parent / "elsewhere")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "train/cat/x.jpg")
    os.open(
        folder / "train/cat/x.jpg", os.O_RDWR
    )  # so that who opens it does not wait for ever; closed with the process


def listening(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "train/cat/s.png"))  # an address of a socket has 107 bytes at most


def name_in_latin_1(folder: Path) -> None:
    (folder / "train/cat/train0.jpg").rename(folder / "train/cat/caf\udce9.jpg")  # the byte e9, as Python names it


def class_in_latin_1(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "cat").rename(folder / split / "caf\udce9")


def giant(folder: Path) -> None:
    with open(folder / "train/cat/giant.jpg", "wb") as file:
        file.truncate(40 * 2**20)


def two_validations(folder: Path) -> None:
    (folder / "validation").mkdir()


@promised(
    "lars convert: image folders",
    ("a link that leads back up the tree", "refused: it would multiply the images", loop, "is a link"),
    ("a link to an image outside the tree", "refused", outside, "is a link"),
    ("a class folder that is a link to another one", "refused", linked_class, "is a link"),
    ("`train` that is a link", "refused", linked_split, "is a link"),
    ("a FIFO named x.jpg", "refused, never opened", pipe, "no regular file"),
    ("a socket named s.png", "refused", listening, "no regular file"),
    (
        "an image whose name is not UTF-8",
        "refused, the name printed safely",
        name_in_latin_1,
        r"caf\udce9.jpg: the name is not UTF-8",
    ),
    (
        "a class whose name is not UTF-8",
        "refused, the name printed safely",
        class_in_latin_1,
        r"caf\udce9: the name is not UTF-8",
    ),
    (
        "an image of 40 MiB",
        "refused before it is read: training reads 32 MiB at most",
        giant,
        "giant.jpg has 41,943,040 bytes",
    ),
    ("both val/ and validation/", "refused: one of them would be missing", two_validations, "both val and validation"),
    arguments="spoil, words",
)
def test_an_image_folder_that_is_not_one(
    spoil: Callable, words: str, folder: Path, out: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(folder)
    spoil(folder)
    assert words in refusal(capsys, str(folder), str(out))
    assert not out.exists()


@promised(
    "lars convert: image folders",
    (
        "files that are no images by name, images beside the class folders",
        "left out and counted by kind; images and classes are printed for each split",
    ),
)
def test_what_is_left_out_is_counted(folder: Path, out: Path, capsys) -> None:
    (folder / "train/cat/readme.txt").write_text("no image")
    (folder / "train/dog/below").mkdir()
    (folder / "train/dog/below/notes.TXT").write_text("no image")
    (folder / "train/dog/below/more.png").write_bytes(image(7, format="PNG"))
    (folder / "val/loose.jpg").write_bytes(image(1))
    assert main([str(folder), str(out)]) == 0
    said = capsys.readouterr().out
    assert "train: 7 images of 2 classes; left out: 2 files (2 .txt)\n" in said
    assert "validation: 2 images of 2 classes; left out: 1 files (1 .jpg outside the class folders)\n" in said
    assert "train: 7 images in 1 files" in said and ("more.png", 1) in rows(out)["train"]


@promised(
    "lars convert: image folders",
    (
        "images without a header: empty files, damaged JPEGs, text",
        "kept, counted on stderr and named in content.json, after a second start too",
    ),
)
def test_images_without_a_header_are_named(folder: Path, out: Path, capsys) -> None:
    (folder / "train/cat/empty.jpg").write_bytes(b"")
    (folder / "train/cat/damaged\n.jpg").write_bytes(image(5)[:20] + bytes(500))
    (folder / "val/dog/text.jpg").write_text("no image")
    for _ in range(2):
        assert main([str(folder), str(out)]) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: 3 images cannot be decoded") and all(
            n in line for n in ("empty", r"damaged\n", "text")
        )
    entries = json.loads((out / "content.json").read_text())["files"]
    assert sorted(entries[PARQUET[0]]["undecodable"]) == ["damaged\n.jpg", "empty.jpg"]
    assert entries[PARQUET[1]]["undecodable"] == ["text.jpg"] and len(rows(out)["train"]) == 8


def swapped(file: Path) -> None:
    """Another picture of the same size in its place, and the time of the first one."""
    then, data = file.stat().st_mtime_ns, bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.with_name("other").write_bytes(data)
    os.replace(file.with_name("other"), file)
    os.utime(file, ns=(then - 1, then - 1))


def changed(file: Path) -> None:
    """A picture that was edited where it is."""
    then, data = file.stat().st_mtime_ns, bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(then + 1, then + 1))


@promised(
    "lars convert: image folders",
    ("an image that is changed in place after it was packed, its size unchanged", "refused at the next start", changed),
    ("an image of the same size, and older, in the place of one that was packed", "refused likewise", swapped),
    arguments="change",
)
@pytest.mark.parametrize("resize", [(), ("--resize", "20")])
def test_an_image_that_changes_after_it_was_packed(
    change: Callable, resize: tuple[str, ...], folder: Path, out: Path, capsys
) -> None:
    assert main([str(folder), str(out), *resize]) == 0
    before = untouched(out)
    change(folder / "train/dog/train1.jpg")
    for _ in range(2):
        line = refusal(capsys, str(folder), str(out), *resize)
        assert f"{PARQUET[0]} was made of other images" in line and "remove" in line
        assert untouched(out) == before


@promised(
    "lars convert: image folders",
    (
        "images with other times and the same bytes, as a copy of the folder has them",
        "compared once with what was packed, which stays as it is",
    ),
)
def test_images_that_were_only_touched(folder: Path, out: Path, monkeypatch) -> None:
    assert main([str(folder), str(out), "--resize", "20"]) == 0
    files, reads = content(out), []
    read = Row.read
    monkeypatch.setattr(Row, "read", lambda row: (reads.append(row.name), read(row))[1])
    assert main([str(folder), str(out), "--resize", "20"]) == 0 and not reads
    for picture in (folder / "val").rglob("*.jpg"):
        os.utime(picture, ns=(1, 1))
    for _ in range(2):
        assert main([str(folder), str(out), "--resize", "20"]) == 0
        assert sorted(reads) == ["val0.jpg", "val0.jpg"] and content(out) == files
    (folder / "val/cat/val0.jpg").write_bytes((folder / "val/cat/val0.jpg").read_bytes()[::-1])
    assert main([str(folder), str(out), "--resize", "20"]) == 2


# ---- what tars hold


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


SIX = {f"n01_{n}.JPEG": image(n) for n in range(6)}


def at_header(number: int, change: Callable[[bytes], bytes]) -> bytes:
    """The tar of six images with one header changed."""
    data = tar_of(SIX)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        offset = archive.getmembers()[number].offset
    return data[:offset] + change(data[offset : offset + 512]) + data[offset + 512 :]


def flipped(header: bytes) -> bytes:
    return bytes([header[0] ^ 1]) + header[1:]


def of_negative_size(header: bytes) -> bytes:
    """With a size of -512 in base 256 and a right checksum: who believes it reads the same member for ever."""
    header = bytearray(header)
    header[124:136] = (-512).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def sparse() -> bytes:
    """A file of GNU's sparse kind: what is stored of it is not its bytes."""
    header = bytearray(member("n01_9.JPEG", bytes(512))[0].tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0%011o\0" % (1024, 512)
    header[483:495] = b"%011o\0" % 1536
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(512) + tar_of({})


ONE = member("n01_1.JPEG", image(1))
CLASS = {"n01.tar": tar_of(SIX)}
LONE = member("n01.tar", CLASS["n01.tar"])


@promised(
    "lars convert: tar files",
    (
        "a flipped bit in the header of the fourth of six images",
        "refused with the byte",
        at_header(3, flipped),
        "damaged at byte",
    ),
    (
        "a header that was overwritten with zeros",
        "refused: what follows is no end",
        at_header(3, lambda _: bytes(512)),
        "damaged at byte",
    ),
    (
        "a second archive after the end of the first",
        "refused: its images would be missing",
        2 * tar_of(SIX),
        "damaged at byte",
    ),
    ("32 KiB of zeros at the end", "refused: a part never came", tar_of(SIX) + bytes(2**15), "damaged at byte"),
    ("an archive that ends between two images", "refused", tar(ONE)[: 512 + -(-len(ONE[1]) // 512) * 512], "cut off"),
    ("a negative size in a header", "refused, not read for ever", at_header(3, of_negative_size), "damaged"),
    ("an image twice", "refused", tar(ONE, ONE), "holds n01_1.JPEG twice"),
    (
        "an image twice, in two folders",
        "refused",
        tar(ONE, member("again/n01_1.JPEG", image(2))),
        "holds n01_1.JPEG twice",
    ),
    (
        "a hard link to nothing",
        "refused",
        tar(ONE, member("n01_2.JPEG", type=tarfile.LNKTYPE, linkname="none")),
        "no regular file",
    ),
    (
        "a symbolic link named as an image",
        "refused, not followed",
        tar(ONE, member("n01_2.JPEG", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
        "no regular file",
    ),
    ("a device named as an image", "refused", tar(ONE, member("n01_2.JPEG", type=tarfile.CHRTYPE)), "no regular file"),
    ("a sparse file", "refused: its bytes are not where they seem to be", sparse(), "no regular file"),
    (
        "an image whose name is not UTF-8",
        "refused, the name printed safely",
        tar(member("caf\udce9.JPEG", image(1))),
        "not UTF-8",
    ),
    ("a class without images", "refused", tar(member("readme.txt", b"nothing")), "holds no image"),
    arguments="inner, words",
)
def test_a_class_tar_that_is_not_whole(inner: bytes, words: str, tmp_path: Path, out: Path, capsys) -> None:
    (tmp_path / TRAIN).write_bytes(tar_of({"n00.tar": tar_of(SIX), "n01.tar": inner, "n02.tar": tar_of(SIX)}))
    with ended_after(5):
        assert words in refusal(capsys, str(tmp_path), str(out), "--split", "train")
    assert not out.exists()


@contextmanager
def ended_after(seconds: int) -> Iterator[None]:
    """A hang ends with TimeoutError, which is an OSError and so never taken for a damaged archive."""
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("it hangs")))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@promised(
    "lars convert: tar files",
    (
        "a damaged header of a class in the outer tar",
        "refused with the byte",
        (lambda data: data[: (at := data.index(b"n02.tar"))] + b"X" + data[at + 1 :])(
            tar_of(CLASS | {"n02.tar": tar_of(SIX)})
        ),
        "damaged at byte",
    ),
    (
        "a class twice in the outer tar",
        "refused",
        tar(member("n01.tar", CLASS["n01.tar"]), member("x/n01.tar", CLASS["n01.tar"])),
        "holds n01.tar twice",
    ),
    ("an outer tar that ends between two classes", "refused", tar(LONE)[: 512 + len(LONE[1])], "cut off"),
    (
        "two tars of one class, n01.tar and n01.TAR",
        "refused: one of them would be missing",
        tar(member("n01.tar", CLASS["n01.tar"]), member("n01.TAR", CLASS["n01.tar"])),
        "two tars of one class",
    ),
    arguments="outer, words",
)
def test_an_outer_tar_that_is_not_whole(outer: bytes, words: str, tmp_path: Path, out: Path, capsys) -> None:
    (tmp_path / TRAIN).write_bytes(outer)
    assert words in refusal(capsys, str(tmp_path), str(out), "--split", "train")
    assert not out.exists()


@promised(
    "lars convert: tar files",
    (
        "hard links to images, and files that are no images by name",
        "a hard link is the image it names; the others are left out and counted",
    ),
)
def test_hard_links_in_a_tar_are_images(tmp_path: Path, out: Path, capsys) -> None:
    links = [member(f"n01_{n}.JPEG", type=tarfile.LNKTYPE, linkname=f"n01_{n - 1}.JPEG") for n in (2, 3)]
    inner = tar(
        ONE,
        *links,
        member("folder", type=tarfile.DIRTYPE),
        member("readme.txt", b"x"),
        member("pipe", type=tarfile.FIFOTYPE),
    )
    (tmp_path / TRAIN).write_bytes(tar_of({"n01.tar": inner, "checksums.md5": b"x"}))
    assert main([str(tmp_path), str(out), "--split", "train"]) == 0
    assert "train: 3 images of 1 classes; left out: 3 files (1 .md5, 1 .txt, 1 no ending)\n" in capsys.readouterr().out
    images = [row["image"] for row in pq.read_table(out / PARQUET[0]).to_pylist()]
    assert {i["path"]: i["bytes"] for i in images} == {f"n01_{n}.JPEG": image(1) for n in (1, 2, 3)}


@promised(
    "lars convert: validation labels",
    ("two labels for one image", "refused", b"a n01\nb n01\na n02\n", "gives a two labels"),
    (
        "labels of images that the tar has not",
        "refused: the tar is not whole",
        b"a n01\nb n01\nc n01\n",
        "1 labels are of images",
    ),
    ("a file that is no text", "refused", b"\xff\xfe\x00", "cannot be read"),
    ("a file that is not there", "refused", None, "cannot be read"),
    arguments="labels, words",
)
def test_labels_that_do_not_fit(labels: bytes | None, words: str, tmp_path: Path, out: Path, capsys) -> None:
    (tmp_path / VAL).write_bytes(tar_of({"a.JPEG": image(1), "b.JPEG": image(2)}))
    if labels is not None:
        (tmp_path / "labels.txt").write_bytes(labels)
    options = "--split", "validation", "--val-labels", str(tmp_path / "labels.txt")
    assert words in refusal(capsys, str(tmp_path), str(out), *options)
    assert not out.exists()


@promised(
    "lars convert: validation labels",
    ("a devkit whose MATLAB file has another type of data", "refused", 0),
    ("a devkit whose MATLAB file is shorter than it says", "refused", 4),
    (
        "a devkit whose MATLAB file ends scipy's reader with a segmentation fault",
        "refused: it is read in another process",
        8,
    ),
    ("a devkit with a name that is no text", "refused", 13),
    ("a devkit without the table", "refused", 42),
    arguments="seed",
)
def test_a_damaged_devkit(seed: int, tmp_path: Path, out: Path) -> None:
    images = {f"ILSVRC2012_val_{n:08d}.JPEG": (WNIDS[n % 4], image(n)) for n in range(4)}
    (tmp_path / VAL).write_bytes(tar_of({name: data for name, (_, data) in images.items()}))
    write_devkit(tmp_path, images)
    devkit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(devkit) as archive:
        inside = {m.name: bytearray(archive.extractfile(m).read()) for m in archive}
    draw = random.Random(seed)
    for data in inside.values():
        for _ in range(4):
            data[draw.randrange(len(data))] = draw.randrange(256)
    devkit.write_bytes(tar_of({name: bytes(data) for name, data in inside.items()}))

    status, said = in_a_child(tmp_path / "said", str(tmp_path), str(out), "--split", "validation")
    assert status == 2 and len(said) == 1 and "is damaged" in said[0]
    assert not out.exists()


def in_a_child(log: Path, *arguments: str) -> tuple[int, list[str]]:
    """Exit status (negative for a signal) and lines on stderr of a start that may end with a signal."""

    def run() -> None:
        faulthandler.disable()  # pytest's: it would print a page
        with log.open("w") as file, redirect_stderr(file):
            status = main(list(arguments))
        os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode, log.read_text().splitlines()


# ---- SOURCE


def cut_parquet(at: Path) -> str:
    for name in PARQUET:
        (at / name).write_bytes(
            (Path(__file__).parents[2] / "recipes/demo/data/validation-00000-of-00001.parquet").read_bytes()[:5000]
        )
    return str(at)


def pipes(at: Path) -> str:
    os.mkfifo(whole_parquet(at) / PARQUET[1].replace("0000-of", "0001-of"))
    return str(at)


def leads_nowhere(at: Path) -> str:
    (whole_parquet(at) / PARQUET[0].replace("0000-of", "0001-of")).symlink_to("nowhere")
    return str(at)


def whole_parquet(at: Path) -> Path:
    for name in PARQUET:
        (at / name).symlink_to(Path(__file__).parents[2] / "recipes/demo/data/validation-00000-of-00001.parquet")
    return at


def looped(at: Path) -> str:
    (at / "loop").symlink_to("loop")
    return str(at / "loop")


def a_file(at: Path) -> str:
    (at / TRAIN).write_bytes(tar_of(CLASS))
    return str(at / TRAIN)


@promised(
    "lars convert: SOURCE",
    (
        "SOURCE is empty, as an unset variable is",
        "refused: it is not the current folder",
        lambda at: "",
        "SOURCE is empty",
    ),
    ("SOURCE is a link loop", "refused", looped, "no such folder"),
    ("SOURCE is a file", "refused", a_file, "is a file: give the folder"),
    ("SOURCE is an empty folder", "refused with what is expected", str, "holds none of what is expected"),
    ("SOURCE of an unknown user (~nobody-x)", "refused", lambda at: "~nobody-x/data", "no such folder"),
    ("SOURCE with a name of 5,000 characters", "refused", lambda at: f"/{'x' * 5000}", "too long"),
    (
        "SOURCE whose name is not UTF-8",
        "refused",
        lambda at: f"{at}/caf\udce9",
        r"caf\udce9: the name is not UTF-8",
    ),
    (
        "Parquet files that are cut off",
        "refused before anything is copied",
        cut_parquet,
        "not a Parquet file, or is not whole",
    ),
    ("a FIFO among the Parquet files", "refused, never opened", pipes, "is no regular file"),
    (
        "a Parquet file that is a link to nothing",
        "refused: its rows would be missing",
        leads_nowhere,
        "is no regular file",
    ),
    arguments="make, words",
)
def test_a_source_that_is_none(
    make: Callable[[Path], str], words: str, tmp_path: Path, out: Path, capsys, monkeypatch
) -> None:
    (tmp_path / "source").mkdir()
    monkeypatch.chdir(small_folder(tmp_path / "current"))
    assert words in refusal(capsys, make(tmp_path / "source"), str(out))
    assert not out.exists()


# One byte of its footer is changed, and pyarrow 26 aborts: "terminate called after throwing an instance of ...".
ENDS_THE_READER = (
    "eNqVUrFOwzAQPVuplaFLh7NiyUOWREGiFUUikxd2hoiJgcWtLBqppSEJEH6FL+Ab+DouDpAKyoB1tp/v7j2fTy4ur5cIKFGeIicgUOgcMtZFrJ"
    "vNAID3kzNau2N5NmL2R56lsEY95kVh7+7HiCRkR7yjEvtyYaBuLyASzXrjdhYDoMOk3Nk7RxinCY8mq5fWNQMOKttuErjSntkHt3bltiC50sqk"
    "oHGqEgEqGyQGKlJYFrJIQ3PwdKWpfEAOhshC5UNhvyT8jd8KN+agKX8rBF7hszhPfmVk6Rsz/2rWeMOJUKmXl+9c8jSkDbK4svXDo2vn66qa27"
    "reP8dPrm7K/X18ni/OFktlqFGDQUm6Bf2GD6khQBk="
)


@promised(
    "lars convert: SOURCE",
    ("a Parquet file that aborts pyarrow", "refused: the footers are read in another process first"),
)
def test_a_parquet_file_that_aborts_its_reader(tmp_path: Path, out: Path) -> None:
    (tmp_path / "source").mkdir()
    for name in PARQUET:
        (tmp_path / "source" / name).write_bytes(zlib.decompress(base64.b64decode(ENDS_THE_READER)))
    status, said = in_a_child(tmp_path / "said", str(tmp_path / "source"), str(out))
    assert status == 2 and len(said) == 1 and "is not a Parquet file" in said[0]
    assert not out.exists()


# ---- OUT


@promised(
    "lars convert: OUT",
    ("*.tmp and *.part of the user's in OUT and below, hidden or not", "never touched, nor any other file"),
)
def test_files_of_the_users_stay(folder: Path, out: Path) -> None:
    assert main([str(folder), str(out)]) == 0
    names = [".thesis.tmp", "a.part", "notes/.draft.tmp", "notes/b/.c.part", ".convert/mine.tmp", ".convert/train.txt"]
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("years of work")
    (out / PARQUET[1]).unlink()
    (out / ".convert" / f"validation.{PARQUET[1]}.tmp").write_text("left by a kill")
    before = untouched(out)
    assert main([str(folder), str(out)]) == 0
    after = untouched(out)
    assert {name: after.get(name) for name in names} == {name: before[name] for name in names}
    assert set(after) - set(before) == {PARQUET[1]} and set(before) - set(after) == {
        f".convert/validation.{PARQUET[1]}.tmp"
    }


def thesis(out: Path) -> Path:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    return out


def hidden(out: Path) -> Path:
    out.mkdir()
    (out / ".draft.tmp").write_text("years of work")
    return out


def file(out: Path) -> Path:
    out.write_text("years of work")
    return out


def below_a_file(out: Path) -> Path:
    out.write_text("years of work")
    return out / "more"


def link_loop(out: Path) -> Path:
    out.symlink_to(out)
    return out


def below_a_link_loop(out: Path) -> Path:
    out.symlink_to(out)
    return out / "more"


def link_to_a_thesis(out: Path) -> Path:
    (out.parent / "elsewhere").mkdir()
    (out.parent / "elsewhere/thesis.tex").write_text("years of work")
    out.symlink_to("elsewhere")
    return out


def told(text: str) -> Callable[[Path], Path]:
    def make(out: Path) -> Path:
        out.mkdir()
        (out / "convert.json").write_text(text)
        return out

    return make


def linked_work(out: Path) -> Path:
    (out.parent / "elsewhere").mkdir()
    (out.parent / f"elsewhere/train.{PARQUET[0]}.tmp").write_text("years of work")
    out.mkdir()
    (out / ".convert").symlink_to("../elsewhere")
    return out


def unwritable(out: Path) -> Path:
    return Path("/proc/convert")


def in_the_source(out: Path) -> Path:
    return out.parent / "in/train/new"


@promised(
    "lars convert: OUT",
    ("OUT holds other files", "refused, nothing is touched", thesis, "is not empty and no conversion"),
    ("OUT holds one hidden file", "refused, nothing is touched", hidden, "is not empty and no conversion"),
    (
        "OUT is a link to a folder with other files",
        "refused, nothing is touched",
        link_to_a_thesis,
        "is not empty and no conversion",
    ),
    ("OUT is a file", "refused", file, "is no folder"),
    ("OUT lies below a file", "refused", below_a_file, "cannot be written"),
    ("OUT is a link loop", "refused", link_loop, "is no folder"),
    ("OUT lies below a link loop", "refused", below_a_link_loop, "cannot be written"),
    ("OUT cannot be written (/proc)", "refused", unwritable, "cannot be written"),
    ("OUT is empty, as an unset variable is", "refused: it is not the current folder", lambda out: "", "OUT is empty"),
    (
        "OUT whose name is not UTF-8",
        "refused",
        lambda out: f"{out}\udce9",
        r"out\udce9: the name is not UTF-8",
    ),
    ("OUT lies in a split of SOURCE", "refused: it would be a class", in_the_source, "lies in SOURCE"),
    ("convert.json is no JSON", "refused", told("\0\1"), "convert.json is not what lars convert wrote"),
    ("convert.json is a list", "refused", told("[1]"), "convert.json is not what lars convert wrote"),
    (
        "convert.json is a number of 5,000 digits",
        "refused",
        told("9" * 5000),
        "convert.json is not what lars convert wrote",
    ),
    (
        "convert.json is nested 100,000 deep",
        "refused",
        told("[" * 100_000),
        "convert.json is not what lars convert wrote",
    ),
    (
        "convert.json of another program",
        "refused",
        told('{"name": "x"}'),
        "convert.json is not what lars convert wrote",
    ),
    (
        "convert.json of a newer version",
        "refused",
        told('{"split": [], "form": 9}'),
        "convert.json is not what lars convert wrote",
    ),
    (
        "convert.json with states of the wrong kind",
        "refused",
        told('{"split": [], "states": 3}'),
        "not what lars convert wrote",
    ),
    ("OUT/.convert is a link to a folder of the user's", "refused, nothing is touched", linked_work, "is a link"),
    arguments="make, words",
)
def test_an_out_that_is_none(
    make: Callable[[Path], Path], words: str, folder: Path, out: Path, capsys, monkeypatch
) -> None:
    given = make(out)
    monkeypatch.chdir(folder.parent)
    before = untouched(folder.parent)
    assert words in refusal(capsys, str(folder), str(given))
    assert untouched(folder.parent) == before


@promised(
    "lars convert: OUT",
    (
        "OUT, or the FOLDER that is packed beside itself, whose path has `[` in it",
        "refused before it is packed",
        "a[1]",
    ),
    ("OUT, or the FOLDER that is packed beside itself, whose path has `*` in it", "refused likewise", "a*"),
    ("OUT, or the FOLDER that is packed beside itself, whose path has `?` in it", "refused likewise", "a?"),
    ("OUT, or the FOLDER that is packed beside itself, whose path has `::` in it", "refused likewise", "a::b"),
    ("OUT, or the FOLDER that is packed beside itself, whose path has `${` in it", "refused likewise", "a${b}"),
    ("OUT, or the FOLDER that is packed beside itself, whose path has a line break in it", "refused likewise", "a\nb"),
    arguments="name",
)
def test_a_path_that_cannot_be_read_afterwards(name: str, folder: Path, tmp_path: Path, capsys) -> None:
    assert "in the path of a folder has a meaning of its own" in refusal(capsys, str(folder), str(tmp_path / name))
    (tmp_path / name).mkdir()
    moved = folder.rename(tmp_path / name / "pictures")
    with pytest.raises(RecipeError, match="in the path of a folder has a meaning of its own"):
        pack(moved)
    assert list((tmp_path / name).iterdir()) == [moved]
    assert main([str(moved), str(tmp_path / "out")]) == 0
    shutil.copytree(tmp_path / "out", tmp_path / name / "packed")
    with pytest.raises(RecipeError, match="in the path of a folder has a meaning of its own"):
        resolve(Data(path=str(tmp_path / name / "packed")))


@promised(
    "lars convert: OUT",
    (
        "content.json with garbage, a list, a number in place of hashes",
        "refused",
        "content.json is not what lars convert wrote",
    ),
    ("a Parquet file that the conversion did not write", "refused, and it stays", "did not write"),
    arguments="words",
)
def test_other_files_in_a_conversion(words: str, folder: Path, out: Path, capsys) -> None:
    assert main([str(folder), str(out)]) == 0
    whole = json.loads((out / "content.json").read_text())
    one = {"files": {name: entry for name, entry in whole["files"].items() if name != PARQUET[1]}}
    entries = [{"files": []}, *({"files": {PARQUET[0]: e}} for e in (3, {"undecodable": 3}, {"originals": []}))]
    bad = [one] if "did not" in words else ["x", [], *entries]
    for found in bad:
        (out / "content.json").write_text(json.dumps(found))
        before = untouched(out)
        assert words in refusal(capsys, str(folder), str(out))
        assert untouched(out) == before


@promised(
    "lars convert: OUT",
    ("a file of OUT that is no whole Parquet file any more, or has names that are not UTF-8", "written again"),
)
def test_a_damaged_file_is_written_again(folder: Path, out: Path) -> None:
    assert main([str(folder), str(out)]) == 0
    whole = content(out)
    (out / PARQUET[0]).write_bytes(whole[PARQUET[0]][:-9])
    (out / PARQUET[1]).write_bytes(whole[PARQUET[1]].replace(b"label", b"lab\xe9l"))
    assert main([str(folder), str(out)]) == 0
    assert content(out) == whole


@promised("lars convert: OUT", ("OUT that another process is writing", "refused, and the other one goes on"))
def test_one_process_writes_out(folder: Path, out: Path, capsys) -> None:
    lock, ended = RunLock(out / ".convert"), threading.Event()
    lock.acquire()
    counting = threading.Thread(target=lambda: [lock.check() for _ in iter(lambda: ended.wait(0.05), True)])
    counting.start()
    try:
        line = refusal(capsys, str(folder), str(out))
    finally:
        ended.set()
        counting.join()
    assert "is being written by" in line and "give another OUT" in line and "run_dir" not in line
    lock.check()
    lock.release()
    assert main([str(folder), str(out)]) == 0 and not (out / ".convert").exists()


# ---- conversions of before


def made_older(out: Path) -> None:
    """convert.json as version 1 wrote it, without content.json."""
    kept = json.loads((out / "convert.json").read_text())
    (out / "convert.json").write_text(
        json.dumps({key: value for key, value in kept.items() if key not in ("form", "writer")})
    )
    (out / "content.json").unlink()


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    folder = tmp_path / "originals"
    folder.mkdir()
    for name in PARQUET:
        table = pq.read_table(Path(__file__).parents[2] / "recipes/demo/data/validation-00000-of-00001.parquet").slice(
            0, 50
        )
        pq.write_table(table, folder / name, row_group_size=20)
    return folder


@promised(
    "lars convert: conversions of before",
    ("a complete conversion of an older version", "its files stay, content.json is added"),
)
def test_a_complete_older_conversion_gets_its_hashes(folder: Path, out: Path) -> None:
    assert main([str(folder), str(out)]) == 0
    hashes, files = (out / "content.json").read_bytes(), content(out)
    made_older(out)
    assert main([str(folder), str(out)]) == 0
    assert (out / "content.json").read_bytes() == hashes and content(out) == files


def without_originals(out: Path) -> dict[str, dict]:
    """The files of a conversion, made as it was before what they are made of was recorded."""
    hashes = json.loads((out / "content.json").read_text())
    for entry in hashes["files"].values():
        del entry["originals"]
    (out / "content.json").write_text(json.dumps(hashes))
    return hashes["files"]


@promised(
    "lars convert: conversions of before",
    ("a conversion of images whose times were not recorded", "stays valid, and changes are noticed from then on"),
)
def test_a_conversion_without_times_gets_them(folder: Path, out: Path, capsys) -> None:
    assert main([str(folder), str(out)]) == 0
    without_originals(out)
    files = content(out)
    assert main([str(folder), str(out)]) == 0 and content(out) == files
    assert "images have other times than were recorded, and are read and compared once" in capsys.readouterr().out
    assert main([str(folder), str(out)]) == 0
    assert "are read and compared" not in capsys.readouterr().out
    changed(folder / "train/cat/train0.jpg")
    assert "was made of other images" in refusal(capsys, str(folder), str(out))


def test_a_comparison_that_was_stopped_goes_on(folder: Path, out: Path, monkeypatch) -> None:
    """Reading all images of a large folder takes hours: what was compared is not read again."""
    assert main([str(folder), str(out)]) == 0
    names = sorted(without_originals(out))
    read, last = Row.read, names[-1].partition("-")[0]

    def stopped(row: Row) -> bytes:
        if Path(row.place).parents[1].name.startswith(last[:3]):
            raise KeyboardInterrupt
        return read(row)

    monkeypatch.setattr(Row, "read", stopped)
    with suppress(KeyboardInterrupt):
        main([str(folder), str(out)])
    entries = json.loads((out / "content.json").read_text())["files"]
    assert ["originals" in entries[name] for name in names] == [True] * (len(names) - 1) + [False]


@promised(
    "lars convert: conversions of before",
    (
        "an unfinished conversion of images by an older version, or by another pyarrow",
        "refused, nothing is touched: its files would not be the same to the byte",
    ),
)
def test_an_unfinished_conversion_by_another_writer_is_refused(folder: Path, out: Path, capsys) -> None:
    assert main([str(folder), str(out)]) == 0
    kept = json.loads((out / "convert.json").read_text())
    (out / "convert.json").write_text(json.dumps({**kept, "writer": "pyarrow 1.0"}))
    assert main([str(folder), str(out)]) == 0  # there is nothing to write
    (out / PARQUET[1]).unlink()
    for change, words in (
        (lambda: None, "begun with pyarrow 1.0"),
        (lambda: made_older(out), "older version of lars convert"),
    ):
        (out / "convert.json").write_text(json.dumps({**kept, "writer": "pyarrow 1.0"}))
        change()
        before = untouched(out)
        assert words in refusal(capsys, str(folder), str(out))
        assert untouched(out) == before


@promised(
    "lars convert: conversions of before",
    ("an unfinished copy of Parquet files by an older version", "goes on with what had come"),
)
def test_an_unfinished_older_copy_goes_on(originals: Path, out: Path, monkeypatch) -> None:
    assert main([str(originals), str(out)]) == 0
    made_older(out)
    name, whole = PARQUET[1], (out / PARQUET[1]).read_bytes()
    state = json.loads((out / "convert.json").read_text())["states"][name]
    (out / name).unlink()
    part = out / f".{name}.{hashlib.sha256(state.encode()).hexdigest()[:16]}.part"
    part.write_bytes(whole[:1000])
    from lars.data.source import Source

    asked, read = out / "asked", Source.read
    monkeypatch.setattr(
        Source, "read", lambda self, path, start, stop: (asked.write_text(str(start)), read(self, path, start, stop))[1]
    )
    assert main([str(originals), str(out)]) == 0
    assert asked.read_text() == "1000" and content(out) == content(originals) and not part.exists()


# ---- what is written


def expected(file: Path) -> dict:
    """An entry of content.json, calculated in another way."""
    data, metadata, groups = file.read_bytes(), pq.read_metadata(file), []
    for group in metadata.to_dict()["row_groups"]:
        starts = [chunk["dictionary_page_offset"] or chunk["data_page_offset"] for chunk in group["columns"]]
        ends = [start + chunk["total_compressed_size"] for start, chunk in zip(starts, group["columns"])]
        groups.append(blake3(data[min(starts) : max(ends)]).hexdigest())
    return {"sha256": hashlib.sha256(data).hexdigest(), "row_groups_blake3": groups}


@promised(
    "lars convert: what is written",
    (
        "images, or Parquet files to copy",
        "content.json has the SHA-256 of each file and the BLAKE3 hash of each row group; `datasets` loads OUT with it",
    ),
)
def test_the_content_of_every_file_is_recorded(folder: Path, originals: Path, out: Path, tmp_path: Path) -> None:
    for source, target in ((folder, out), (originals, tmp_path / "copied")):
        assert main([str(source), str(target)]) == 0
        entries = json.loads((target / "content.json").read_text())["files"]
        originals_told = [entry.pop("originals", None) for entry in entries.values()]  # of images
        assert all(originals_told) == any(originals_told) == (source == folder)
        assert entries == {name: expected(target / name) for name in PARQUET}
        loaded = datasets.load_dataset(str(target), cache_dir=str(tmp_path / "cache"))
        assert {split: loaded[split].num_rows for split in loaded} == {
            s: len(found) for s, found in rows(target).items()
        }
    assert content(tmp_path / "copied") == content(originals)
    assert len(entries[PARQUET[0]]["row_groups_blake3"]) == 3


@promised(
    "lars convert: what is written",
    (
        "a split whose files are in a folder of its name, as on the Hub's converted branches",
        "content.json names each by its path from OUT on",
    ),
)
def test_files_of_the_same_name_in_two_splits(originals: Path, out: Path) -> None:
    for split, name in zip(("train", "validation"), PARQUET):
        (originals / split).mkdir()
        (originals / name).rename(originals / split / "0000.parquet")
    assert main([str(originals), str(out)]) == 0
    entries = json.loads((out / "content.json").read_text())["files"]
    assert entries == {name: expected(out / name) for name in ("train/0000.parquet", "validation/0000.parquet")}


@promised(
    "lars convert: what is written",
    (
        "a flipped bit in a page of a file that was written",
        "found by its page checksum; without damage the checksums change no row",
    ),
)
def test_pages_have_checksums(folder: Path, out: Path) -> None:
    assert main([str(folder), str(out)]) == 0
    file = out / PARQUET[0]
    assert pq.read_table(file, page_checksum_verification=True) == pq.read_table(file)
    data = bytearray(file.read_bytes())
    at = data.index(image(0)) + 100
    data[at] ^= 1
    file.write_bytes(data)
    assert pq.read_table(file).num_rows == 6
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(file, page_checksum_verification=True)


@promised(
    "lars convert: what is written",
    ("an image that is cut off after it was listed", "one line, exit status 1, and no file"),
)
def test_an_image_that_becomes_shorter(folder: Path, out: Path, capsys, monkeypatch) -> None:
    from lars.commands import convert

    listed = convert.image_folder
    monkeypatch.setattr(
        convert, "image_folder", lambda *a: (listed(*a), (folder / "train/cat/train0.jpg").write_bytes(b"x"))[0]
    )
    assert main([str(folder), str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "has become shorter" in line and not (out / PARQUET[0]).exists()


@promised(
    "lars convert: what is written",
    ("an image that vanishes after it was listed", "one line that does not promise that a restart helps"),
)
def test_an_image_that_vanishes(folder: Path, out: Path, capsys, monkeypatch) -> None:
    from lars.commands import convert

    listed = convert.image_folder
    monkeypatch.setattr(convert, "image_folder", lambda *a: (listed(*a), (folder / "train/cat/train0.jpg").unlink())[0])
    assert main([str(folder), str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "train0.jpg" in line and "once that is mended" in line
