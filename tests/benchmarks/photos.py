"""`python -m tests.benchmarks.photos OUT [--images N] [--folder DIR]`: JPEG photographs like ImageNet's.

They are for benchmarks of loading: Parquet in the Hub's schema, and the same files as an ImageFolder if asked. The
pixels are those of the photographs that ship with scikit-image and scikit-learn (extra `bench`), so JPEG decoding costs
what it costs on real ones; labels mean nothing.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES, SEED, ROW_GROUP = 10, 0, 100
SIZES = {
    (500, 375): 0.55,
    (375, 500): 0.2,
    (500, 333): 0.15,
    (333, 500): 0.05,
    (640, 480): 0.03,
    (1280, 960): 0.02,
}  # and shares
GREY, CMYK = 100, 350  # of every 500 photographs these two are not RGB


def write(
    out: Path, images: int = 1000, folder: Path | None = None, files: int = 4, row_group: int = ROW_GROUP
) -> None:
    """`images` photographs for training and a tenth of that for validation.

    `folder` takes those for training, a folder a class.
    """
    from datasets import ClassLabel, Features
    from datasets import Image as ImageColumn

    originals = photographs()
    schema = Features({"image": ImageColumn(), "label": ClassLabel(num_classes=CLASSES)}).arrow_schema
    out.mkdir(parents=True, exist_ok=True)
    for number, (split, count, parts) in enumerate((("train", images, files), ("validation", max(1, images // 10), 1))):
        for part in range(parts):
            numbers = range(part * count // parts, (part + 1) * count // parts)
            names = [f"{split}_{i:07d}.JPEG" for i in numbers]
            rows = [photograph(originals, np.random.default_rng([SEED, number, i]), i) for i in numbers]
            columns = [
                [{"bytes": data, "path": name} for name, (data, _) in zip(names, rows)],
                [label for _, label in rows],
            ]
            path = out / f"{split}-{part:05d}-of-{parts:05d}.parquet"
            pq.write_table(pa.table(columns, schema=schema), path, row_group_size=row_group)
            for name, (data, label) in zip(names, rows) if folder and split == "train" else ():
                path = folder / f"{label:04d}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)


def photographs() -> list[Image.Image]:
    """The originals. Ends the program with status 2 where scikit-image or scikit-learn is missing."""
    try:
        from skimage import data
        from sklearn.datasets import load_sample_images
    except ImportError:
        print(
            "the photographs come with scikit-image and scikit-learn: pip install 'lars-imagenet[bench]'",
            file=sys.stderr,
        )
        sys.exit(2)
    arrays = [
        data.astronaut(),
        data.chelsea(),
        data.coffee(),
        data.rocket(),
        data.hubble_deep_field(),
        data.stereo_motorcycle()[0],
    ]
    return [Image.fromarray(pixels) for pixels in arrays + list(load_sample_images().images)]


def photograph(originals: list[Image.Image], rng: np.random.Generator, number: int) -> tuple[bytes, int]:
    """(JPEG, label): a random part of a random original, mirrored or not, brighter or darker, with a camera's noise."""
    original = originals[rng.integers(len(originals))]
    width, height = list(SIZES)[rng.choice(len(SIZES), p=list(SIZES.values()))]
    part = rng.uniform(0.6, 1.0) * min(original.width / width, original.height / height)
    left, top = rng.uniform(0, original.width - part * width), rng.uniform(0, original.height - part * height)
    image = original.resize(
        (width, height), Image.Resampling.BICUBIC, box=(left, top, left + part * width, top + part * height)
    )
    pixels = np.asarray(image, np.float32)[:, :: rng.choice([-1, 1])] * rng.uniform(0.7, 1.2)
    pixels += rng.uniform(4, 11) * rng.standard_normal((height, width, 1), np.float32)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image = image.convert({GREY: "L", CMYK: "CMYK"}.get(number % 500, "RGB"))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(86, 96)))
    return buffer.getvalue(), int(rng.integers(CLASSES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the Parquet files")
    parser.add_argument("--images", type=int, default=1000, help="for training; a tenth more for validation")
    parser.add_argument("--folder", type=Path, help="where the same photographs go as an ImageFolder")
    parser.add_argument("--files", type=int, default=4, help="for training")
    parser.add_argument("--row-group", type=int, default=100, help="rows")
    args = parser.parse_args()
    write(args.out, args.images, args.folder, args.files, args.row_group)


if __name__ == "__main__":
    main()
