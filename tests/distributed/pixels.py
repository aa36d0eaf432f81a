"""`python -m tests.distributed.pixels`: SHA-256 of pixels, by the way they come: decoders, resizing, whole views.

The images are some of the demo's, and JPEGs of several sizes and kinds that are drawn here with integers alone.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image

from lars.data.augment import draws_of, evaluation_image, training_image
from lars.data.decode import Encoded
from lars.recipe import config

DEMO = Path(__file__).parents[2] / "recipes/demo"
_SIZES = ((375, 500), (500, 333), (97, 131), (641, 480))  # height, width; odd ones too
_VIEWS = 4  # of each image


def pattern(height: int, width: int) -> np.ndarray:
    """Slopes, edges and noise: uint8 (height, width, 3), drawn without floating point."""
    y, x = np.mgrid[:height, :width].astype(np.uint64)
    noise = ((x * 2654435761 + y * 40503 + 12345) * 6364136223846793005) >> np.uint64(58)
    planes = (x * 255 // width, y * 255 // height, (x * y // 7) % 256)
    edges = 60 * ((x // 16 + y // 24) % 2)
    return np.stack([((p + edges + noise) % 256).astype(np.uint8) for p in planes], axis=2)


def jpegs() -> dict[str, bytes]:
    """{name: JPEG}: chroma at full, half and quarter density, progressive, grey, CMYK, small and large."""
    found = {}
    for height, width in _SIZES:
        for chroma in ("444", "422", "420"):
            found[f"{height}x{width} {chroma}"] = simplejpeg.encode_jpeg(pattern(height, width), 85, "RGB", chroma)
    image = Image.fromarray(pattern(*_SIZES[0]))
    for name, kind, more in (("progressive", "RGB", {"progressive": True}), ("grey", "L", {}), ("CMYK", "CMYK", {})):
        stream = io.BytesIO()
        image.convert(kind).save(stream, "JPEG", quality=90, **more)
        found[name] = stream.getvalue()
    return found


def digest(arrays: Iterable[np.ndarray | bytes]) -> str:
    """SHA-256 over arrays, shapes included."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(repr(getattr(array, "shape", "")).encode())
        found.update(array if isinstance(array, bytes) else np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def views(images: list[bytes], augment: config.Augment, size: int) -> Iterator[np.ndarray]:
    """Training views of the images, as a decoder of the loader makes them."""
    for number, image in enumerate(images):
        for row in draws_of(0, np.arange(_VIEWS), np.full(_VIEWS, number)):
            yield training_image(image, augment, size, row)


def hashes() -> dict[str, str]:
    """{what: SHA-256 of its pixels}."""
    made = list(jpegs().values())
    column = pq.read_table(DEMO / "data/validation-00000-of-00001.parquet", columns=["image"]).slice(0, 64)["image"]
    demo = [row["bytes"] for row in column.to_pylist()]
    found = {"drawn JPEGs": digest(made)}
    for scale in (1.0, 0.5, 0.25, 0.125):
        for fast in (False, True):
            name = f"decoded at {scale:g}{', fast' * fast}"
            found[name] = digest(Encoded(image).pixels(scale, fast) for image in (*made, *demo))
    alexnet, resnet = (config.load(DEMO / f"{name}.yaml", []).augment for name in ("alexnet", "resnet50"))
    full = replace(alexnet, scale=[0.08, 1.0], ratio=[0.75, 4 / 3], erase=0.25)
    found["demo/alexnet, training"] = digest(views(demo, alexnet, 67))
    found["demo/resnet50, training"] = digest(views(demo, resnet, 28))
    found["crop and linear, 224"] = digest(views(made, full, 224))
    found["crop and area, 32"] = digest(views(made, full, 32))  # far below half of what is decoded: area
    found["resize, then crop, 64"] = digest(views(made, replace(resnet, resize=80, pad=4), 64))
    found["crop and RandAugment, 96"] = digest(views(made, replace(full, randaugment="rand-m9-mstd0.5-inc1"), 96))
    for way in ("bilinear", "area", "tf1_bilinear"):
        like = replace(full, resampling=way, eval_resize=256)
        for size in (224, 32):
            found[f"resampling {way}, {size}"] = digest(views(made, like, size))
        found[f"resampling {way}, evaluation"] = digest(evaluation_image(image, like, 224) for image in made)
    for recipe, images, size, resize in (("demo", demo, 67, 67), ("224", made, 224, 256), ("48", made, 48, 48)):
        augment = replace(alexnet, eval_resize=resize)
        found[f"evaluation, {recipe}"] = digest(evaluation_image(image, augment, size) for image in images)
    return found


if __name__ == "__main__":
    print(json.dumps(hashes(), indent=1))
