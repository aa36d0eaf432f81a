"""Decoding within bounds, augmentation that only its keys decide, and what stands in for a bad image."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from conftest import DEMO
from PIL import Image

from lars.data.augment import draws_of, evaluation_image, training_image
from lars.data.decode import BadImage, Encoded
from lars.data.index import build_indexes
from lars.data.loader import evaluation_batches, training_batches
from lars.data.order import Order
from lars.data.resample import resampled
from lars.recipe import config
from lars.recipe.refusal import RecipeError


def encoded(mode: str = "RGB", size: tuple[int, int] = (60, 40), format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and holds none."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize(
    ("mode", "format"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG")],
)
def test_every_mode_becomes_rgb(mode: str, format: str) -> None:
    if mode == "I;16":
        buffer = io.BytesIO()
        Image.fromarray(np.full((40, 60), 30_000, np.uint16)).save(buffer, format)
        data = buffer.getvalue()
    else:
        data = encoded(mode, format=format)
    pixels = Encoded(data).pixels()
    assert pixels.shape == (40, 60, 3) and pixels.dtype == np.uint8
    if mode == "I;16":
        assert (pixels == 30_000 >> 8).all()  # Pillow's own conversion clips to 255
    elif format == "JPEG" or mode == "P":
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("data", [None, b"", b"not an image", encoded()[:300], png_header(100_000, 100_000)])
def test_bytes_that_are_no_image_within_bounds_are_refused(data: bytes | None) -> None:
    with pytest.raises(BadImage):
        Encoded(data).pixels()


def view(recipe: config.Recipe, seed: int, epoch: int, sample: int) -> np.ndarray:
    draws = draws_of(seed, np.array([7, epoch]), np.array([7, sample]))[1]  # what else is in the batch does not matter
    return training_image(encoded(size=(50, 50)), recipe.augment, recipe.model.image_size, draws)


@pytest.mark.parametrize("name", ["alexnet", "resnet50"])
def test_only_seed_epoch_and_sample_decide_a_view(name: str) -> None:
    recipe = config.load(DEMO / f"{name}.yaml", [])
    first = view(recipe, 0, 1, 2)
    assert first.shape == (recipe.model.image_size,) * 2 + (3,)
    assert np.array_equal(first, view(recipe, 0, 1, 2))
    assert not any(np.array_equal(first, view(recipe, *other)) for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)))


def test_boxes_spread_like_torchvisions() -> None:
    from lars.data.augment import _random_box
    from lars.exact.keyed import uniform

    augment = config.load(DEMO.parent / "resnet50/lars-b32k-90ep.yaml", []).augment
    image = Image.new("RGB", (500, 375))
    ours = np.array([_random_box(image.size, augment, iter(uniform(42, 7, i))) for i in range(4000)])
    draw = torchvision.transforms.RandomResizedCrop.get_params
    torch.manual_seed(0)
    theirs = np.array([draw(image, tuple(augment.scale), tuple(augment.ratio)) for _ in range(4000)])  # top, left, h, w
    for a, b in (
        (ours[:, 2] - ours[:, 0], theirs[:, 3]),
        (ours[:, 3] - ours[:, 1], theirs[:, 2]),
        (ours[:, 0], theirs[:, 1]),
    ):
        # five standard errors of a difference of means, and of a ratio of deviations where the kurtosis is at most 3
        assert abs(a.mean() - b.mean()) < 5 * b.std() * (2 / 4000) ** 0.5
        assert abs(a.std() / b.std() - 1) < 5 * (2 / (2 * 4000)) ** 0.5


def test_evaluation_cuts_the_centre() -> None:
    augment = config.load(DEMO / "resnet50.yaml", []).augment
    pixels = np.zeros((28, 48, 3), np.uint8)
    pixels[:, 10:38] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert evaluation_image(buffer.getvalue(), augment, 28).min() == 255


def folder_with(tmp_path, images: list[bytes], labels: list[int], row_group: int = 10):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {"image": pa.array([{"bytes": i, "path": None} for i in images], kind), "label": pa.array(labels, pa.int64())}
    )
    for split in ("train", "validation"):
        pq.write_table(table, tmp_path / f"{split}-0.parquet", row_group_size=row_group)
    return config.load(
        DEMO / "resnet50.yaml",
        [f"data.path={tmp_path}", "global_batch=8", "bn_group=4", "epochs=10", "runtime.micro_batch=8"],
    )


def test_a_bad_image_gives_way_to_its_neighbour_and_is_counted(tmp_path) -> None:
    good = [encoded("L", (28, 28), "PNG") for _ in range(20)]
    images = [b"garbage" if i == 9 else data for i, data in enumerate(good)]
    recipe = folder_with(tmp_path, images, list(range(10)) * 2)
    index, _ = build_indexes(recipe.data, 10)
    batches = training_batches(Order(index, 0, 8, 4), index, recipe, [range(8)], 0, 5)
    seen = [next(batches) for _ in range(5)]  # two epochs
    batches.close()
    assert sum(b.bad for b in seen) == 2
    places = [(b, int(np.flatnonzero(b.ids == 9)[0])) for b in seen if 9 in b.ids]
    assert [int(b.labels[slot]) for b, slot in places] == [0, 0]  # row 0 of the same row group


def test_evaluation_reads_every_image_once_in_any_cut(tmp_path) -> None:
    recipe = folder_with(tmp_path, [encoded("L", (28, 28), "PNG")] * 23, [i % 10 for i in range(23)])
    _, index = build_indexes(recipe.data, 10)
    for cuts in ([range(6)], [range(2), range(2, 4), range(4, 6)]):
        ids = np.concatenate([b.ids for cut in cuts for b in evaluation_batches(index, recipe, 4, cut)])
        assert np.array_equal(ids, np.arange(23))


def test_a_label_out_of_range_is_found_when_read_if_statistics_are_missing(tmp_path) -> None:
    recipe = folder_with(tmp_path, [encoded("L", (28, 28), "PNG")] * 20, [0] * 19 + [10])
    with pytest.raises(RecipeError, match="model.num_classes=11"):
        build_indexes(recipe.data, 10)
    table = pq.read_table(tmp_path / "train-0.parquet")
    for split in ("train", "validation"):
        pq.write_table(table, tmp_path / f"{split}-0.parquet", row_group_size=10, write_statistics=False)
    index, _ = build_indexes(recipe.data, 10)
    batches = training_batches(Order(index, 0, 8, 4), index, recipe, [range(8)], 0, 5)
    with pytest.raises(RecipeError, match="labels 0 ... 10"):
        for _ in range(3):
            next(batches)


def test_the_fingerprint_is_the_content_not_the_path(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    images = [encoded("L", (28, 28), "PNG")] * 20
    prints = [build_indexes(folder_with(tmp_path / n, images, [0] * 20).data, 10)[0].fingerprint for n in "ab"]
    other = build_indexes(folder_with(tmp_path / "b", images, [1] * 20).data, 10)[0].fingerprint
    assert prints[0] == prints[1] != other


def waves(width: int, height: int) -> bytes:
    """A JPEG."""
    y, x = np.mgrid[:height, :width]
    planes = 128 + 100 * np.sin(x / 9 + y / 23), 255 * x / width, 128 + 90 * np.cos(y / 5)
    buffer = io.BytesIO()
    Image.fromarray(np.stack(planes, -1).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def augment_of(*overrides: str) -> config.Augment:
    return config.load(DEMO.parent / "resnet50/lars-b32k-90ep.yaml", list(overrides)).augment


SIZES = [(500, 375), (375, 500), (640, 427), (301, 233), (1280, 960)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("way", "interpolation"), [("mixed", "bicubic"), ("bilinear", "bilinear")])
def test_evaluation_is_timms_transform_to_the_pixel(size: tuple[int, int], way: str, interpolation: str) -> None:
    from timm.data import create_transform

    transform = create_transform(
        (3, 224, 224), crop_pct=0.875, interpolation=interpolation, is_training=False, mean=(0, 0, 0), std=(1, 1, 1)
    )
    theirs = transform(Image.open(io.BytesIO(waves(*size))).convert("RGB")) * 255
    ours = evaluation_image(waves(*size), augment_of(f"augment.resampling={way}"), 224)
    assert np.array_equal(ours, theirs.round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", SIZES)
def test_a_sources_resampling_is_its_librarys_own_call(size: tuple[int, int]) -> None:
    """The same box of the fully decoded image; "mixed", the control, is none of them."""
    from torchvision.transforms import functional as F

    from lars.data.augment import _random_box

    image, row = (
        Image.open(io.BytesIO(waves(*size))).convert("RGB"),
        draws_of(0, np.array([0]), np.array([sum(size)]))[0],
    )
    left, top, right, bottom = _random_box(image.size, augment_of(), iter(row.tolist()))
    cut = np.asarray(image)[top:bottom, left:right]
    theirs = {
        "bilinear": np.asarray(F.resized_crop(image, top, left, bottom - top, right - left, [224, 224])),
        "area": cv2.resize(cut, (224, 224), interpolation=cv2.INTER_AREA),
    }
    ways = ("bilinear", "area", "mixed")
    keys = [["augment.flip=0.0", f"augment.resampling={way}"] for way in ways]
    ours = {way: training_image(waves(*size), augment_of(*key), 224, row) for way, key in zip(ways, keys)}
    for way, pixels in theirs.items():
        assert np.array_equal(ours[way], pixels), way
        assert not np.array_equal(ours["mixed"], pixels), way


def test_tensorflow_1s_bilinear_is_its_own() -> None:
    """Red of tf.compat.v1.image.resize (2.21.0), and the whole where TensorFlow is installed."""
    pixels = (np.arange(5 * 7 * 3) * 37 % 256).astype(np.uint8).reshape(5, 7, 3)
    ours = resampled(pixels, (3, 2), "tf1_bilinear")
    assert ours[:, :, 0].tolist() == [[0, 174, 91], [22, 196, 114]]  # 0, 173.667, 91.333, 22.5, 196.167, 113.833
    tensorflow = pytest.importorskip("tensorflow")
    pixels = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    theirs = tensorflow.compat.v1.image.resize(pixels[None], [160, 48]).numpy()[0]
    assert np.array_equal(resampled(pixels, (48, 160), "tf1_bilinear"), np.rint(theirs))


def test_a_large_photograph_is_decoded_small_and_looks_the_same() -> None:
    """Control: the full decode and Pillow's antialiased resize of the same box. Pixels are the same on every CPU."""
    augment = augment_of("augment.flip=0.0", "augment.scale=[0.5,1.0]", "augment.resampling=mixed")
    y, x = np.mgrid[:1800, :2400]
    pixels = np.stack([128 + 100 * np.sin(x / 90 + y / 230), 255 * x / 2400, 128 + 90 * np.cos(y / 50)], -1).astype(
        np.uint8
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
    full, draws = Image.open(io.BytesIO(buffer.getvalue())), draws_of(0, np.zeros(8, np.int64), np.arange(8))
    from lars.data.augment import _random_box

    assert Encoded(buffer.getvalue()).pixels(224 / 1200).shape == (450, 600, 3)
    for row in draws:
        box = _random_box(full.size, augment, iter(row.tolist()))
        theirs = np.asarray(full.resize((224, 224), Image.Resampling.BILINEAR, box=box)).astype(float)
        assert np.abs(training_image(buffer.getvalue(), augment, 224, row) - theirs).mean() < 2
