"""What a sample looks like, keyed by (seed, epoch, sample id): the same pixels on any worker of any rank."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image, ImageOps

from lars.data.decode import MAX_PIXELS, BadImage, Encoded
from lars.data.resample import resampled
from lars.exact.keyed import Purpose, uniform
from lars.recipe.keys import Augment
from lars.recipe.refusal import RecipeError, one_line


class Draw(IntEnum):
    """Where a sample's random numbers for augmentation stand. Frozen: a new one comes behind, so that none moves."""

    CROP = 0  # four for each of 10 tries, as many as it takes; the flip takes the next one
    RANDAUGMENT = 41
    ERASE = 42


_TRIES = 10  # of torchvision's RandomResizedCrop before it falls back to the centre
DRAWS = max(Draw) + 1
_SECTION = re.compile(
    r"(m|n|mmax)(\d{1,4})|(inc)([01])|(p|mstd)(\d+(?:\.\d+)?)|(t)(weights|3a|3aw)"
)  # of a RandAugment policy
_PILLOWS = {"mixed": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}  # of evaluation
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 3.3)  # of random erasing, as in timm


def draws_of(seed: int, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """float64 (n, DRAWS) in [0, 1): the random numbers of n samples, each row a function of its own keys alone."""
    return uniform(DRAWS, seed, Purpose.AUGMENT, epochs[:, None], samples[:, None])


def training_image(data: bytes | memoryview | None, augment: Augment, size: int, draws: np.ndarray) -> np.ndarray:
    """uint8 (size, size, 3): one random view of a sample; `draws` is its row of `draws_of`.

    Raises:
        BadImage: from `decode`, or so long and thin that it would be resized to more than MAX_PIXELS.
        RecipeError: RandAugment failed.
    """
    image, draw = Encoded(data), iter(draws[Draw.CROP :].tolist())
    if augment.crop == "random_resized_crop":
        pixels = _random_resized_crop(image, augment, size, draw)
    else:
        pixels = _random_crop(image, augment, size, draw)
    if next(draw) < augment.flip:
        pixels = cv2.flip(pixels, 1)
    if augment.randaugment:
        # timm draws from the global generators of Python and numpy: seeded for each sample, they carry nothing on
        random.seed(int(draws[Draw.RANDAUGMENT] * 2**53))
        np.random.seed(int(draws[Draw.RANDAUGMENT] * 2**32))
        try:
            pixels = np.asarray(_rand_augment(augment.randaugment, size, tuple(augment.mean))(Image.fromarray(pixels)))
        except MemoryError:
            raise
        except Exception as error:
            raise RecipeError(
                f"augment.randaugment={augment.randaugment} failed: {type(error).__name__}: {one_line(error)}"
            ) from None
    if draws[Draw.ERASE] < augment.erase:
        pixels = _erase(pixels, augment, random.Random(int(draws[Draw.ERASE] * 2**53)))
    return pixels


def check_policy(policy: str) -> None:
    """Raise RecipeError for a RandAugment policy that timm would silently cut to a limit, or in part leave out."""
    name, *sections = policy.split("-")
    found = {}
    for section in sections:
        if match := _SECTION.fullmatch(section):
            key, value = filter(None, match.groups())
            found[key] = value
    known = name == "rand" and len(found) == len(sections)  # each section is one, and none stands twice
    if not known or float(found.get("p", 0)) > 1:
        raise RecipeError(f"augment.randaugment={policy} is no policy of timm: write it as in rand-m9-mstd0.5-inc1")
    limit = int(found.get("mmax", 10))
    if int(found.get("m", limit)) > limit:
        raise RecipeError(f"augment.randaugment={policy}: magnitude m is at most {limit}, or what -mmax says")
    transform = _rand_augment(policy, 224, (128.0,) * 3)
    if not 1 <= transform.num_layers <= len(transform.ops):
        raise RecipeError(
            f"augment.randaugment={policy}: n must lie in 1 ... {len(transform.ops)}, the number of its operations"
        )


def evaluation_image(data: bytes | memoryview | None, augment: Augment, size: int) -> np.ndarray:
    """uint8 (size, size, 3): the shorter side to `eval_resize`, then the centre; the same pixels as timm's.

    With `resampling: bilinear` they are torchvision's.
    """
    encoded = Encoded(data)
    sides = encoded.width, encoded.height
    shorter, longer = augment.eval_resize, int(augment.eval_resize * max(sides) / min(sides))
    extent = _bounded(sides, (shorter, longer) if sides[0] <= sides[1] else (longer, shorter))
    pixels = encoded.pixels()
    del encoded  # with what Pillow holds of it: a large image should not be there three times
    if augment.resampling in _PILLOWS:
        image = Image.fromarray(pixels)
        del pixels
        image = image if image.size == extent else image.resize(extent, _PILLOWS[augment.resampling])
    else:
        image = Image.fromarray(resampled(pixels, extent, augment.resampling))
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _decoded(image: Encoded, augment: Augment, scale: float) -> np.ndarray:
    """Whole and exact, as the sources decode; "mixed" has quicker pixels, and no more of them than `scale` asks for."""
    return image.pixels(scale, fast=True) if augment.resampling == "mixed" else image.pixels()


def _random_resized_crop(image: Encoded, augment: Augment, size: int, draw: Iterator[float]) -> np.ndarray:
    left, top, right, bottom = _random_box((image.width, image.height), augment, draw)
    pixels = _decoded(image, augment, max(size / (right - left), size / (bottom - top)))
    down, across = pixels.shape[0] / image.height, pixels.shape[1] / image.width  # 1, or less where it came smaller
    rows = slice(int(top * down), max(int(bottom * down), int(top * down) + 1))
    columns = slice(int(left * across), max(int(right * across), int(left * across) + 1))
    return resampled(pixels[rows, columns], (size, size), augment.resampling)


def _random_crop(image: Encoded, augment: Augment, size: int, draw: Iterator[float]) -> np.ndarray:
    if augment.resize:
        scale = augment.resize / min(image.width, image.height)
        extent = (max(augment.resize, round(image.width * scale)), max(augment.resize, round(image.height * scale)))
        extent = _bounded((image.width, image.height), extent)
        pixels = resampled(_decoded(image, augment, scale), extent, augment.resampling)
    else:
        pixels = _decoded(image, augment, 1.0)
    rows, columns = (max(0, size - side - 2 * augment.pad) for side in pixels.shape[:2])  # what a small image lacks
    if augment.pad or rows or columns:
        edges = [side + augment.pad for side in (rows // 2, rows - rows // 2, columns // 2, columns - columns // 2)]
        pixels = cv2.copyMakeBorder(pixels, *edges, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    left = int(next(draw) * (pixels.shape[1] - size + 1))
    top = int(next(draw) * (pixels.shape[0] - size + 1))
    return pixels[top : top + size, left : left + size]


def _random_box(extent: tuple[int, int], augment: Augment, draw: Iterator[float]) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop: area uniform in `scale`, log aspect ratio uniform in `ratio`."""
    width, height = extent
    low, high = (math.log(r) for r in augment.ratio)
    for _ in range(_TRIES):
        area = width * height * (augment.scale[0] + next(draw) * (augment.scale[1] - augment.scale[0]))
        ratio = math.exp(low + next(draw) * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        left, top = next(draw), next(draw)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(left * (width - w + 1)), int(top * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * augment.ratio[1])) if width > height else width
    h = min(height, round(width / augment.ratio[0])) if height > width else height
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _bounded(sides: tuple[int, int], extent: tuple[int, int]) -> tuple[int, int]:
    """`extent`, to which an image of these sides is resized."""
    if extent[0] * extent[1] > MAX_PIXELS:
        raise BadImage(f"{sides[0]} x {sides[1]} pixels, which would be resized to {extent[0]} x {extent[1]}")
    return extent


@lru_cache
def _rand_augment(policy: str, size: int, mean: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment, with the arguments that timm's own transform gives it."""
    from timm.data.auto_augment import rand_augment_transform

    transform = rand_augment_transform(
        policy, {"translate_const": int(size * 0.45), "img_mean": tuple(min(255, round(m)) for m in mean)}
    )
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm's, which may ask for 0 bits: black, as Pillow had it before 13, which refuses them."""
    if bits <= 0:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def _erase(pixels: np.ndarray, augment: Augment, generator: random.Random) -> np.ndarray:
    """Random erasing (Zhong et al. 2017) as timm's `const` mode: a rectangle becomes the mean, 0 once normalised."""
    height, width, _ = pixels.shape
    for _ in range(_TRIES):
        area = generator.uniform(*_ERASED_AREA) * width * height
        ratio = math.exp(generator.uniform(*map(math.log, _ERASED_RATIO)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            top, left = generator.randint(0, height - h), generator.randint(0, width - w)
            pixels = pixels.copy()
            pixels[top : top + h, left : left + w] = [round(m) for m in augment.mean]
            break
    return pixels
