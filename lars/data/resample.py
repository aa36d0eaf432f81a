"""Pixels at another size, by the values of `augment.resampling`; docs/resize.md measures how far they are apart."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image


def resampled(pixels: np.ndarray, extent: tuple[int, int], way: str) -> np.ndarray:
    """uint8 (height, width, 3) brought to `extent` (width, height).

    mixed: OpenCV's linear, which sees all pixels down to half; below that the mean over a new pixel's area.
    bilinear: Pillow's, whose filter widens as the image shrinks; torchvision has the same pixels.
    area: OpenCV's mean over a new pixel's area, as FFCV.
    tf1_bilinear: TensorFlow 1's, in its float32 to the bit, then rounded.
    """
    if pixels.shape[1::-1] == extent:
        return pixels
    if way == "bilinear":
        return np.asarray(Image.fromarray(pixels).resize(extent, Image.Resampling.BILINEAR))
    if way == "tf1_bilinear":
        return _tensorflow1(pixels, extent)
    small = pixels.shape[1] > 2 * extent[0] or pixels.shape[0] > 2 * extent[1]
    return cv2.resize(pixels, extent, interpolation=cv2.INTER_AREA if small or way == "area" else cv2.INTER_LINEAR)


def _tensorflow1(pixels: np.ndarray, extent: tuple[int, int]) -> np.ndarray:
    left, right, across = _neighbours(pixels.shape[1], extent[0])
    above, below, down = _neighbours(pixels.shape[0], extent[1])
    flat = pixels.reshape(len(pixels), -1)  # red, green and blue side by side: twice as fast
    columns = ((side[:, None] * 3 + np.arange(3)).ravel() for side in (left, right))
    rows = _between(*(flat.take(those, axis=1).astype(np.float32) for those in columns), across.repeat(3))
    new = _between(rows[above], rows[below], down[:, None])
    return np.rint(new, out=new).astype(np.uint8).reshape(extent[1], extent[0], 3)


def _between(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """first + (second - first) * weight, in the place of `second`."""
    second -= first
    second *= weight
    second += first
    return second


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first, second, weight of the second) of the old pixels that each new one sees, however many lie between.

    As tensorflow/core/kernels/image/resize_bilinear_op.cc with half_pixel_centers false: new pixel i lies at
    i * old / new, so the whole image is moved by half of what is skipped.
    """
    at = np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))
    first = at.astype(np.int64)
    return first, np.minimum(first + 1, old - 1), at - first.astype(np.float32)
