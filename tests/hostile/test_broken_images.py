"""Images: only what their bytes say makes them bad, they cost no more than their size, and no draw moves."""

from __future__ import annotations

import errno
import io
import logging
import multiprocessing
import os
import random
import resource
import signal
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import torch
from conftest import DEMO
from PIL import Image, ImageOps
from promises import promised
from timm.data.auto_augment import rand_augment_transform

from lars.data import augment, decode, processes
from lars.data.augment import Draw, check_policy, draws_of, evaluation_image, training_image
from lars.data.decode import BadImage, Encoded
from lars.data.index import build_indexes
from lars.data.loader import Loader, training_batches
from lars.data.order import Order
from lars.data.source import BadImages, DataError, DecoderError
from lars.engine.evaluate import evaluate
from lars.exact.keyed import MixDraw, Purpose
from lars.recipe import config
from lars.recipe.keys import Augment, Recipe
from recipes.train import main

AREA = "Images"
RECIPE = DEMO / "resnet50.yaml"
POLICY = "rand-m9-mstd0.5-inc1"
PATTERN = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def colours(**changes: object) -> Augment:
    return replace(config.load(RECIPE, []).augment, **changes)


def tiff(tags: dict[int, tuple[int, int, int | bytes]], tail: bytes = b"") -> bytes:
    """A little-endian TIFF with these tags, {number: (type, count, value or bytes)}; `tail` begins at byte 8."""
    entries, values = b"", b""
    begin = 8 + len(tail) + 2 + 12 * len(tags) + 4
    for tag, (kind, count, value) in sorted(tags.items()):
        entries += struct.pack("<HHLL", tag, kind, count, value if isinstance(value, int) else begin + len(values))
        values += b"" if isinstance(value, int) else value
    return (
        b"II*\0" + struct.pack("<L", 8 + len(tail)) + tail + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + values
    )


def grey_tiff(width: int, height: int, bits: int = 8, compression: int = 1) -> dict[int, tuple[int, int, int | bytes]]:
    return {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, 1, bits),
        259: (3, 1, compression),
        262: (3, 1, 1),
        277: (3, 1, 1),
    }


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """An 8 x 8 PNG with more chunks in front of its pixels."""
    header, pixels = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0), zlib.compress(b"\0" * 8 * 25)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts
    )


def folder_with(folder: Path, images: list[bytes], *keys: str) -> Recipe:
    """A data set of these images, ten to a row group, the same for training and validation; each has a name."""
    rows = [{"bytes": image, "path": f"photo-{n}.jpg"} for n, image in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {"image": pa.array(rows, kind), "label": pa.array([n % 10 for n in range(len(images))], pa.int64())}
    )
    for split in ("train", "validation"):
        pq.write_table(table, folder / f"{split}-0.parquet", row_group_size=10)
    shape = ("global_batch=8", "bn_group=4", "epochs=10", "runtime.micro_batch=8", "data.workers=1")
    return config.load(RECIPE, [f"data.path={folder}", *shape, *keys])


def loader(recipe: Recipe, steps: int = 5) -> Loader:
    index, _ = build_indexes(recipe.data, 10)
    return training_batches(Order(index, 0, 8, 4), index, recipe, [range(8)], 0, steps)


def failure_of(recipe: Recipe) -> Exception:
    batches, end = loader(recipe), time.monotonic() + 30
    batches.stop = lambda: time.monotonic() > end  # a hang is another error
    try:
        with pytest.raises(DataError) as failed:
            for _ in range(5):
                next(batches)
    finally:
        batches.close()
    return failed.value


GOOD = [saved(Image.fromarray(PATTERN[:28, :28]), "PNG")] * 20


# what makes an image bad


@promised(
    AREA,
    (
        "a decoder that runs out of memory",
        "the run saves and ends with one line that names the image; nothing stands in for it",
    ),
)
def test_memory_that_runs_out_is_no_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = processes.Decoding.run

    def short_of_memory(self: processes.Decoding) -> None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 64 * 2**20,) * 2)
        run(self)

    monkeypatch.setattr(processes.Decoding, "run", short_of_memory)
    large = saved(Image.new("RGB", (7000, 7000)), "PNG")
    error = failure_of(folder_with(tmp_path, [large if n == 7 else image for n, image in enumerate(GOOD)]))
    assert isinstance(error, DecoderError) and "MemoryError" in str(error) and "lower data.workers" in str(error)
    assert "sample 7: 'photo-7.jpg', row 7 of row group 0 of" in str(error)


@promised(
    AREA,
    ("no file descriptor is left (EMFILE)", "not the image's fault", OSError(errno.EMFILE, "Too many open files")),
    (
        "Pillow's codec is out of memory",
        "not the image's fault",
        OSError("out of memory error when reading image file"),
    ),
    ("libtiff is out of memory", "not the image's fault", OSError("decoder error -9")),
    ("a library is missing", "not the image's fault", ImportError("no littlecms")),
    arguments="error",
)
def test_errors_of_the_machine_are_not_the_images(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(decode.Image, "open", fail)
    with pytest.raises(type(error)) as raised:
        Encoded(GOOD[0])
    assert not isinstance(raised.value, BadImage)


@promised(
    AREA,
    ("libjpeg is out of memory", "not the image's fault; it is not decoded by Pillow instead, whose pixels are others"),
)
def test_libjpeg_without_memory_is_not_replaced_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("Insufficient memory (case 4)")

    image = Encoded(saved(Image.fromarray(PATTERN), "JPEG"))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    with pytest.raises(MemoryError):
        image.pixels()


@promised(
    AREA,
    ("a JPEG that is cut off", "a bad image: its neighbour stands in for it, counted and named", "JPEG"),
    ("a PNG that is cut off", "likewise", "PNG"),
    ("a WebP that is cut off", "likewise", "WEBP"),
    ("a GIF that is cut off", "likewise", "GIF"),
    ("a BMP that is cut off", "likewise", "BMP"),
    ("a TIFF that is cut off", "likewise", "TIFF"),
    ("a PPM that is cut off", "likewise", "PPM"),
    arguments="kind",
)
def test_cut_off_images_are_bad(kind: str) -> None:
    data = saved(Image.fromarray(PATTERN), kind)
    for length in (12, len(data) // 2, len(data) - len(data) // 8):
        with pytest.raises(BadImage):
            Encoded(data[:length]).pixels()


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One to eight bytes, or a stretch, are others; or a part is doubled, left out or cut off."""
    found = bytearray(data)
    what = chance.randrange(5)
    place, length = chance.randrange(len(found)), chance.randrange(1, 64)
    if what <= 1:
        for _ in range(chance.randrange(1, 9)):
            found[chance.randrange(min(len(found), 64 if what else len(found)))] = chance.choice(
                (0, 1, 127, 128, 255, chance.randrange(256))
            )
    elif what == 2:
        found[place : place + length] = chance.randbytes(length)
    elif what == 3:
        found[place:place] = found[place : place + length]
    else:
        del found[place : place + length]
    return bytes(found)


def seeds() -> list[bytes]:
    image = Image.fromarray(PATTERN)
    made = [saved(image, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]
    made += [
        saved(image.convert(mode), "TIFF", compression=how)
        for mode, how in (("RGBA", "tiff_lzw"), ("L", "tiff_deflate"), ("RGB", "jpeg"), ("1", "group4"))
    ]
    made += [
        saved(image.convert("CMYK"), "JPEG"),
        saved(image, "JPEG", progressive=True),
        saved(image, "WEBP", lossless=True),
    ]
    frames = [image.quantize(16, dither=Image.Dither.NONE), image.rotate(90).quantize(8)]
    made += [saved(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("GIF", "PNG", "WEBP")]
    return made + [saved(image.convert(mode), "PNG") for mode in ("P", "LA", "1", "RGBA")]


@pytest.mark.filterwarnings("ignore")
@promised(
    AREA,
    ("600 images of seven formats with a few bytes changed, moved or left out", "pixels or a bad image, nothing else"),
)
def test_mutated_images_are_pixels_or_bad() -> None:
    chance, made, crop = random.Random(0), seeds(), colours(resize=40)
    rows = draws_of(0, np.zeros(600, np.int64), np.arange(600))
    outcomes = set()
    for number, row in enumerate(rows):
        data = mutated(made[number % len(made)], chance)
        for view in (lambda: evaluation_image(data, crop, 28), lambda: training_image(data, crop, 28, row)):  # noqa: B023
            try:
                assert view().shape == (28, 28, 3)
                outcomes.add("pixels")
            except BadImage:
                outcomes.add("bad")
    assert outcomes == {"pixels", "bad"}


@promised(AREA, ("an image that cannot be decoded", "the warning names its sample, its `path` and its place"))
def test_a_bad_image_is_named_by_its_file(tmp_path: Path) -> None:
    logging.getLogger("lars").addHandler(
        handler := logging.FileHandler(tmp_path / "log")
    )  # the reader is another process
    try:
        batches = loader(folder_with(tmp_path, [b"garbage" if n == 13 else image for n, image in enumerate(GOOD)]))
        assert sum(batch.bad for batch in batches) == 2  # two epochs
    finally:
        logging.getLogger("lars").removeHandler(handler)
    said = (tmp_path / "log").read_text()
    assert (
        "sample 13 cannot be decoded (neither JPEG, TIFF, PNG" in said
        and "'photo-13.jpg', row 3 of row group 1 of" in said
    )


@promised(AREA, ("a bad image whose row group can no longer be read", "the run saves and ends with one line, no hang"))
def test_a_neighbour_that_cannot_be_read_is_an_error_of_its_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise DataError("the disk is gone")

    monkeypatch.setattr("lars.data.reader.Reader.neighbour", gone)
    assert "the disk is gone" in str(
        failure_of(folder_with(tmp_path, [b"garbage" if n == 3 else image for n, image in enumerate(GOOD)]))
    )


@promised(
    AREA,
    (
        "more bad images than `data.max_bad_fraction` allows",
        "the line says which share would do, and that it is another run",
    ),
)
def test_the_advice_of_too_many_bad_images_fits() -> None:
    assert BadImages.beyond(1, 100, 0.01) is None
    error = BadImages.beyond(6, 1009, 0.005)
    assert (
        "6 images could not be decoded" in str(error)
        and "data.max_bad_fraction=0.006 or more" in str(error)
        and "run_dir" in str(error)
    )
    assert BadImages.again == "" and "start the same command" in DataError.again


@promised(
    AREA, ("a bad image in the validation split", "one line, no traceback: the accuracy would be another split's")
)
def test_a_bad_validation_image_is_one_line(tmp_path: Path) -> None:
    """The engine is a stand-in; a `DataError` is what train.py prints as one line."""
    recipe = folder_with(tmp_path, [b"garbage" if n == 3 else image for n, image in enumerate(GOOD)])
    alone = SimpleNamespace(num_processes=1)
    engine = SimpleNamespace(
        accelerator=alone,
        rank=0,
        device=torch.device("cpu"),
        eval_module=torch.nn.Identity(),
        logits=lambda x: torch.zeros(len(x), 10),
    )
    with pytest.raises(DataError, match="1 images of the validation split cannot be decoded"):
        evaluate(
            engine,
            recipe,
            build_indexes(recipe.data, 10)[1],
            SimpleNamespace(micro_batch=8),
            lambda _: False,
            lambda: False,
        )


# what an image means


@promised(
    AREA,
    (
        "a TIFF of 32-bit integers",
        "a bad image: nothing says which value is white",
        lambda: saved(Image.fromarray(np.full((9, 9), 200, np.int32)), "TIFF"),
    ),
    ("a TIFF of 32-bit numbers", "likewise", lambda: saved(Image.fromarray(np.full((9, 9), 0.5, np.float32)), "TIFF")),
    ("a PFM of 32-bit numbers", "likewise", lambda: saved(Image.fromarray(np.full((9, 9), 0.5, np.float32)), "PPM")),
    arguments="make",
)
def test_pixels_of_unknown_range_are_refused(make: Callable[[], bytes]) -> None:
    with pytest.raises(BadImage, match="nothing says which value is white"):
        Encoded(make())


@promised(
    AREA,
    (
        "a TIFF of 16-bit pixels",
        "its high bytes",
        lambda: saved(Image.fromarray(np.full((2, 2), 30_000, np.uint16)), "TIFF"),
        30_000 >> 8,
    ),
    (
        "a TIFF of 12-bit pixels",
        "its high 8 bits",
        lambda: tiff({**grey_tiff(2, 2, 12), 273: (4, 1, 8), 278: (3, 1, 2)}, b"\xab\xca\xbc" * 2),
        0xAB,
    ),
    (
        "a PGM of 16-bit pixels",
        "its high bytes",
        lambda: b"P5 2 2 65535\n" + struct.pack(">4H", *[30_000] * 4),
        30_000 >> 8,
    ),
    arguments="make, value",
)
def test_deep_grey_is_scaled(make: Callable[[], bytes], value: int) -> None:
    assert Encoded(make()).pixels().tolist() == [[[value] * 3] * 2] * 2


@promised(
    AREA,
    (
        "a JPEG whose EXIF says it is turned",
        "its pixels as they are stored, as for timm and torchvision",
        "JPEG",
        False,
    ),
    ("a PNG whose EXIF says it is turned", "likewise", "PNG", False),
    ("a WebP whose EXIF says it is turned", "likewise", "WEBP", False),
    ("a TIFF whose own tag says it is turned", "turned, as by Pillow", "TIFF", True),
    arguments="kind, turned",
)
def test_orientation(kind: str, turned: bool) -> None:
    image, exif = Image.fromarray(PATTERN), Image.Exif()
    exif[0x112] = 6
    data = saved(image, kind, exif=exif)
    stored = Encoded(saved(image, kind)).pixels()
    assert np.array_equal(Encoded(data).pixels(), np.rot90(stored, 3) if turned else stored)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (40, 60)  # Control: the file does say so


@promised(AREA, ("transparent pixels", "their colours as stored; alpha is dropped, as by Pillow's convert('RGB')"))
def test_alpha_is_dropped() -> None:
    alpha = np.arange(40 * 60, dtype=np.uint8).reshape(40, 60, 1)
    assert np.array_equal(Encoded(saved(Image.fromarray(np.concatenate([PATTERN, alpha], 2)), "PNG")).pixels(), PATTERN)


@promised(
    AREA,
    (
        "an EPS image",
        "a bad image; Ghostscript is never started",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    ),
    ("an ICO image", "a bad image: no format of photographs is left out, and no other is read", "ICO"),
    ("a TGA image", "likewise", "TGA"),
    ("a JPEG 2000 image", "likewise", "JPEG2000"),
    ("an AVIF image", "likewise", "AVIF"),
    arguments="what",
)
def test_other_formats_are_refused(what: bytes | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(BadImage, match="neither JPEG, TIFF, PNG"):
        Encoded(what if isinstance(what, bytes) else saved(Image.fromarray(PATTERN), what)).pixels()
    assert not (tmp_path / "started").exists()


# what an image may cost


def long_exif() -> bytes:
    """A CMYK JPEG (Pillow opens it) whose EXIF block has half a million resolutions."""
    block, image = (
        tiff({282: (5, 500_000, struct.pack("<LL", 7, 3) * 500_000), 296: (3, 1, 2)}),
        saved(Image.new("CMYK", (8, 8)), "JPEG"),
    )
    parts = [b"Exif\0\0" + block[at : at + 65_000] for at in range(0, len(block), 65_000)]
    return image[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", 2 + len(part)) + part for part in parts) + image[2:]


def many_scans() -> bytes:
    image = saved(Image.new("L", (4000, 4000)), "JPEG")
    return image[:-2] + b"\xff\xda" * 50_000 + image[-2:]


def wide_gif() -> bytes:
    """A GIF of 8 x 8 whose frame is 65,535 x 65,535."""
    data = bytearray(saved(Image.new("P", (8, 8)), "GIF"))
    at = data.index(b"\x2c") + 5
    data[at : at + 4] = b"\xff" * 4
    return bytes(data)


WIDE_WEBP = b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0" * 2 + b"\0" * 4


@promised(
    AREA,
    (
        "a TIFF with 300,000 strips for 100 rows",
        "a bad image, before an object is made of each",
        lambda: tiff({**grey_tiff(100, 100), 273: (4, 300_000, b"\x08\0\0\0" * 300_000), 278: (3, 1, 1)}),
    ),
    (
        "a TIFF whose one tile has 3.6 thousand million pixels",
        "a bad image, before memory is taken for it",
        lambda: tiff(
            {**grey_tiff(1, 1, 8, 8), 322: (4, 1, 60_000), 323: (4, 1, 60_000), 324: (4, 1, 8), 325: (4, 1, 9)},
            b"x" * 9,
        ),
    ),
    (
        "a PNG with 30 MB in a zTXt chunk",
        "a bad image, before it is unpacked",
        lambda: png((b"zTXt", b"k\0\0" + zlib.compress(bytes(3 * 10**7), 1))),
    ),
    (
        "a PNG with 30 MB in its colour profile",
        "likewise",
        lambda: png((b"iCCP", b"k\0\0" + zlib.compress(bytes(3 * 10**7), 1))),
    ),
    (
        "a PNG with 100 zTXt chunks of 1 MB",
        "likewise",
        lambda: png(*[(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6)))] * 100),
    ),
    ("a GIF of 8 x 8 with a frame of 65,535 x 65,535", "a bad image, before memory is taken for it", wide_gif),
    ("a WebP of 16,384 x 16,384", "a bad image, before memory is taken for it", lambda: WIDE_WEBP),
    ("a JPEG of 16 million pixels with 50,000 scans", "a bad image, before any is decoded", many_scans),
    arguments="make",
)
def test_bombs_inside_of_formats_are_bad(make: Callable[[], bytes]) -> None:
    data = make()
    tracemalloc.start()
    try:
        with pytest.raises(BadImage, match="numbers|tiles|Decompressed|text chunks|DecompressionBomb|scans"):
            Encoded(data).pixels()
        assert tracemalloc.get_traced_memory()[1] < 4 * len(data) + 70 * 2**20  # Pillow keeps 64 MiB of texts
    finally:
        tracemalloc.stop()


@promised(AREA, ("a JPEG with half a million numbers in its EXIF block", "pixels; the block is not read"))
def test_an_exif_block_is_not_read() -> None:
    data = long_exif()
    tracemalloc.start()
    try:
        assert Encoded(data).pixels().shape == (8, 8, 3)
        assert tracemalloc.get_traced_memory()[1] < 6 * len(data)
    finally:
        tracemalloc.stop()


@promised(
    AREA,
    ("a PNG of 1 x 10,000 (99 bytes)", "a bad image: resized it would have more than 64 million pixels", (1, 10_000)),
    ("a PNG of 1 x 65,500", "likewise", (1, 65_500)),
    ("a PNG of 65,500 x 1", "likewise", (65_500, 1)),
    arguments="size",
)
def test_long_and_thin_images_are_bad_before_they_are_resized(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, wide = saved(Image.new("L", size), "PNG"), colours(resize=256, eval_resize=256)
    monkeypatch.setattr(Encoded, "pixels", lambda *_, **__: pytest.fail("decoded"))
    for view in (
        lambda: evaluation_image(data, wide, 224),
        lambda: training_image(data, wide, 224, draws_of(0, np.zeros(1, int), np.zeros(1, int))[0]),
    ):
        with pytest.raises(BadImage, match="would be resized to"):
            view()


@promised(AREA, ("an image of 1 x 1,000 at an evaluation size of 28", "pixels"))
def test_thin_images_within_bounds_are_pixels() -> None:
    assert evaluation_image(saved(Image.new("L", (1, 1000)), "PNG"), colours(), 28).shape == (28, 28, 3)


@promised(
    AREA, ("a large PNG in any mode", "Pillow's pixels, converted in strips so that they are not held three times")
)
def test_strips_are_the_whole() -> None:
    large = Image.fromarray(np.tile(PATTERN, (53, 35, 1)))  # 2,120 x 2,100, more than one strip
    for mode in ("RGB", "P", "LA"):
        image = large.convert(mode)
        assert np.array_equal(
            Encoded(saved(image, "PNG", compress_level=1)).pixels(), np.asarray(image.convert("RGB"))
        ), mode


# augmentation and random draws


@promised(AREA, ("a release of this project", "purposes and places of random draws keep their numbers"))
def test_random_draws_are_frozen() -> None:
    """New ones come behind: they have numbers of their own, and move none of these."""
    purposes = {"ROW_GROUPS": 1, "WINDOW": 2, "AUGMENT": 3, "DROPOUT": 4, "TURN": 5, "MIX": 6}
    draws = {"CROP": 0, "RANDAUGMENT": 41, "ERASE": 42}
    mixing = {"CUT": 0, "CENTRE_DOWN": 1, "CENTRE_ACROSS": 2, "SHARE": 3}
    for kind, frozen in ((Purpose, purposes), (Draw, draws), (MixDraw, mixing)):
        now = {member.name: int(member) for member in kind}
        assert frozen.items() <= now.items()
        assert all(number > max(frozen.values()) for name, number in now.items() if name not in frozen)
    assert all(len(kind.__members__) == len(kind) for kind in (Purpose, Draw, MixDraw))  # no number stands twice
    row = draws_of(1, np.array([2]), np.array([3]))[0]
    assert [row[d].hex() for d in (0, 4, 41, 42)] == FROZEN


FROZEN = ["0x1.bfbdc194bbea6p-2", "0x1.e22e6842ab8e4p-3", "0x1.51b07cd199f92p-2", "0x1.4973957841346p-2"]


@promised(AREA, ("another draw behind the last", "no view changes"))
def test_a_new_draw_moves_no_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, data = (np.arange(20) % 3, np.arange(20)), saved(Image.fromarray(PATTERN), "PNG")
    drawn = colours(crop="random_resized_crop", scale=[0.08, 1.0], ratio=[0.75, 1.33], randaugment=POLICY, erase=0.5)
    before = [training_image(data, drawn, 28, row) for row in draws_of(0, *keys)]
    monkeypatch.setattr(augment, "DRAWS", augment.DRAWS + 7)
    rows = draws_of(0, *keys)
    assert rows.shape == (20, 50)
    assert all(np.array_equal(training_image(data, drawn, 28, row), view) for row, view in zip(rows, before))


@promised(
    AREA,
    (
        "`augment.randaugment=rand-zzz`",
        "refused: timm would leave it out without a word",
        "rand-zzz",
        "no policy of timm",
    ),
    ("`augment.randaugment=randm9`", "refused", "randm9", "no policy of timm"),
    ("`augment.randaugment=rand-m9.5`", "refused", "rand-m9.5", "no policy of timm"),
    ("`augment.randaugment=rand-m-9`", "refused", "rand-m-9", "no policy of timm"),
    (
        "`augment.randaugment=rand-m9-tnone`",
        "refused: no set of operations of that name",
        "rand-m9-tnone",
        "no policy of timm",
    ),
    ("`augment.randaugment=rand-m9-m5`", "refused: timm would take one of them", "rand-m9-m5", "no policy of timm"),
    ("`augment.randaugment=rand-m9-p1.5`", "refused: no probability", "rand-m9-p1.5", "no policy of timm"),
    (
        "`augment.randaugment=rand-m99`",
        "refused: timm would cut it to 10 without a word",
        "rand-m99",
        "m is at most 10",
    ),
    ("`augment.randaugment=rand-m21-mmax20`", "refused likewise", "rand-m21-mmax20", "m is at most 20"),
    ("`augment.randaugment=rand-m9-n0`", "refused: nothing would be done", "rand-m9-n0", "n must lie in 1 ... 15"),
    ("`augment.randaugment=rand-m9-n99`", "refused", "rand-m9-n99", "n must lie in 1 ... 15"),
    arguments="policy, words",
)
def test_policies_that_timm_would_misread(policy: str, words: str, capsys: pytest.CaptureFixture) -> None:
    status = main(["--config", str(RECIPE), "--check", "--processes", "2", f"augment.randaugment={policy}"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert (
        status == 2
        and len(lines) == 1
        and lines[0].startswith(f"error: augment.randaugment={policy}")
        and words in lines[0]
    )


@promised(AREA, ("the policies of timm's own examples", "accepted"))
def test_good_policies_are_accepted() -> None:
    for policy in (
        "rand",
        POLICY,
        "rand-m9-n3-mstd0.5",
        "rand-mstd1-tweights",
        "rand-m15-mmax20-p0.3-inc0",
        "rand-m6-t3a",
        "rand-m9-mstd101-n2-t3aw",
    ):
        check_policy(policy)


@promised(
    AREA,
    (
        "RandAugment that posterizes to 0 bits, which Pillow 13 refuses",
        "black, as with older Pillow; all other views are timm's to the pixel",
    ),
)
def test_posterizing_to_no_bits_is_black_and_moves_nothing_else() -> None:
    assert not np.asarray(augment._posterize(Image.fromarray(PATTERN), 0)).any()
    data, plain = saved(Image.fromarray(PATTERN), "PNG"), colours()
    theirs = rand_augment_transform(
        POLICY, {"translate_const": 12, "img_mean": tuple(min(255, round(m)) for m in plain.mean)}
    )
    for row in draws_of(3, np.arange(400) % 5, np.arange(400)):  # two of them draw 0 bits
        view = training_image(data, replace(plain, randaugment=POLICY), 28, row)
        random.seed(int(row[41] * 2**53))
        np.random.seed(int(row[41] * 2**32))
        try:
            control = np.asarray(theirs(Image.fromarray(training_image(data, plain, 28, row))))
        except ValueError as error:
            assert "bits" in str(error)
        else:
            assert np.array_equal(view, control)


@promised(
    AREA,
    (
        "an augmentation that fails",
        "the run saves and ends with one line that names the policy, the sample and its file",
    ),
)
def test_an_augmentation_that_fails_names_sample_and_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def broken(*_: object) -> Callable[[Image.Image], Image.Image]:
        def transform(image: Image.Image) -> Image.Image:
            raise ValueError("bits must be\nmore")

        return transform

    monkeypatch.setattr(augment, "_rand_augment", broken)
    error = failure_of(folder_with(tmp_path, GOOD, f"augment.randaugment={POLICY}"))
    assert isinstance(error, DecoderError) and "\n" not in str(error)
    assert f"augment.randaugment={POLICY} failed: ValueError: bits must be (sample " in str(error) and "'photo-" in str(
        error
    )
    assert "Traceback" not in capfd.readouterr().err


# the processes of the loader


def _hold_a_loader(recipe: Recipe, pipe: multiprocessing.connection.Connection) -> None:
    batches = loader(recipe, 1000)
    next(batches)
    pipe.send(list(batches.children))
    time.sleep(60)


@promised(AREA, ("a run killed while its reader and decoders are stopped (SIGSTOP)", "none of them stays behind"))
def test_stopped_children_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    parent = context.Process(target=_hold_a_loader, args=(folder_with(tmp_path, GOOD), theirs))
    parent.start()
    children = [psutil.Process(child) for child in ours.recv()]
    for child in children:
        child.suspend()
    parent.kill()
    parent.join()
    _, alive = psutil.wait_procs(children, timeout=10)
    left = [child.pid for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    for child in left:
        os.kill(child, signal.SIGKILL)
    assert len(children) == 2 and not left


@promised(AREA, ("a loader that is closed while its processes are stopped", "none of them stays behind"))
def test_stopped_children_end_with_their_loader(tmp_path: Path) -> None:
    batches = loader(folder_with(tmp_path, GOOD), 1000)
    next(batches)
    children = [psutil.Process(child) for child in batches.children]
    for child in children:
        child.suspend()
    batches.close()
    assert len(children) == 2 and not any(child.is_running() for child in children)


class _CudaError:
    """Like torch's enum: a number, and true whatever it is."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __int__(self) -> int:
        return self.value


@promised(
    AREA,
    ("memory that was pinned for the GPU", "no warning", 0),
    ("memory that could not be pinned", "a warning with its size and CUDA's error; copies are slower", 2),
    arguments="value",
)
def test_pinning_is_told_as_it_went(
    value: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no GPU here: `cudart` is a stand-in whose answers are those of torch's enum."""

    class Cudart:
        cudaHostRegister = staticmethod(lambda *_: _CudaError(value))
        cudaHostUnregister = staticmethod(lambda *_: _CudaError(0))

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart)
    shared = processes.Shared(3, 2, 8, 4096)
    with caplog.at_level(logging.WARNING):
        shared.pin()
    assert (
        shared.pinned == (value == 0)
        and ("CUDA error 2" in caplog.text) == bool(value)
        and bool(caplog.text) == bool(value)
    )
    shared.unpin()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_memory_is_really_pinned(caplog: pytest.LogCaptureFixture) -> None:
    shared = processes.Shared(3, 2, 8, 4096)
    shared.pin()
    assert shared.pinned and torch.from_numpy(shared.images).is_pinned() and not caplog.text
    shared.unpin()
