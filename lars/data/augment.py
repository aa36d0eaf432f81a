"""Crop and flip, keyed by (seed, epoch, sample id): the same pixels on any worker of any rank."""
from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from lars.config import Augment
from lars.data.decode import decode
from lars.keyed import uniform

_AUGMENT = 3  # what a random key is for
_TRIES = 10  # of torchvision's RandomResizedCrop before it falls back to the centre
DRAWS = 4 * _TRIES + 1


def draws_of(seed: int, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """float64 (n, DRAWS) in [0, 1): the random numbers of n samples, each row a function of its own keys alone."""
    return uniform(DRAWS, seed, _AUGMENT, epochs[:, None], samples[:, None])


def training_image(data: bytes, augment: Augment, size: int, draws: np.ndarray) -> np.ndarray:
    """uint8 (size, size, 3): one random view of a sample; `draws` is its row of `draws_of`.

    Raises:
        BadImage: from `decode`.
    """
    draws = iter(draws.tolist())
    if augment.crop == "random_resized_crop":
        image = decode(data)  # at full scale: the crop may be a small part of it
        box = _random_box(image.size, augment, draws)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    else:
        image = decode(data, augment.resize)
        image = _resize_shorter(image, augment.resize) if augment.resize else image
        image = ImageOps.expand(image, augment.pad) if augment.pad else image
        image = ImageOps.expand(image, _missing(image.size, size)) if min(image.size) < size else image
        left = int(next(draws) * (image.width - size + 1))
        top = int(next(draws) * (image.height - size + 1))
        image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[:, ::-1]) if next(draws) < augment.flip else pixels


def evaluation_image(data: bytes, augment: Augment, size: int) -> np.ndarray:
    """uint8 (size, size, 3): the shorter side to `eval_resize`, then the centre."""
    image = _resize_shorter(decode(data), augment.eval_resize)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _random_box(extent: tuple[int, int], augment: Augment, draws: Iterator[float]) -> tuple[float, float, float, float]:
    """torchvision's RandomResizedCrop: area uniform in `scale`, log aspect ratio uniform in `ratio`."""
    width, height = extent
    low, high = (math.log(r) for r in augment.ratio)
    for _ in range(_TRIES):
        area = width * height * (augment.scale[0] + next(draws) * (augment.scale[1] - augment.scale[0]))
        ratio = math.exp(low + next(draws) * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        left, top = next(draws), next(draws)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(left * (width - w + 1)), int(top * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * augment.ratio[1])) if width > height else width
    h = min(height, round(width / augment.ratio[0])) if height > width else height
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _resize_shorter(image: Image.Image, shorter: int) -> Image.Image:
    scale = shorter / min(image.size)
    size = (max(shorter, round(image.width * scale)), max(shorter, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _missing(extent: tuple[int, int], size: int) -> tuple[int, int, int, int]:
    """Zero pixels to add left, top, right and bottom so that a crop of `size` fits."""
    lacks = [max(0, size - side) for side in extent]
    return lacks[0] // 2, lacks[1] // 2, lacks[0] - lacks[0] // 2, lacks[1] - lacks[1] // 2
