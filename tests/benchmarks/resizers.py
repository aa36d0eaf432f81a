"""Views of a JPEG as the sources of the recipes make them: their decoder, their call, their arguments.

docs/resize.md says where each was read. A box is (left, top, right, bottom); None is evaluation, with the source's own
cut.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image
from torchvision.transforms import CenterCrop, Resize
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

from lars.data.decode import Encoded

SIZE, SHORTER = 224, 256  # of evaluation: the shorter side, then the centre
Box = tuple[int, int, int, int]


class Source(NamedTuple):
    view: Callable[[bytes, Box | None], np.ndarray]
    key: str | None  # the value of augment.resampling that is meant for it
    needs: str = "PIL"


def whole(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def centre(width: int, height: int) -> Box:
    """A share of 224/256 of the shorter side, as FFCV and Google's submissions cut before they resize."""
    side = int(SIZE / SHORTER * min(width, height))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def torchvision(mode: InterpolationMode, data: bytes, box: Box | None) -> np.ndarray:
    if box is None:
        return np.asarray(CenterCrop(SIZE)(Resize(SHORTER, mode)(whole(data))))
    left, top, right, bottom = box
    return np.asarray(F.resized_crop(whole(data), top, left, bottom - top, right - left, [SIZE, SIZE], mode))


def ffcv(data: bytes, box: Box | None) -> np.ndarray:
    image = whole(data)
    left, top, right, bottom = box or centre(*image.size)
    return cv2.resize(np.asarray(image)[top:bottom, left:right], (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def tensorflow1(method: str, cut_first: bool, data: bytes, box: Box | None) -> np.ndarray:
    import tensorflow as tf

    resize = partial(tf.compat.v1.image.resize, method=getattr(tf.image.ResizeMethod, method))
    encoded = Encoded(data)
    if box is None and not cut_first:
        factor = SHORTER / min(encoded.height, encoded.width)
        extent = [int(np.float32(side) * np.float32(factor)) for side in (encoded.height, encoded.width)]
        top, left = ((side - SIZE) // 2 for side in extent)
        return resize(tf.image.decode_jpeg(data)[None], extent).numpy()[0, top : top + SIZE, left : left + SIZE]
    left, top, right, bottom = box or centre(encoded.width, encoded.height)
    pixels = tf.image.decode_and_crop_jpeg(data, [top, left, bottom - top, right - left])
    return resize(pixels[None], [SIZE, SIZE]).numpy()[0]


@cache
def dali_pipeline(evaluation: bool) -> Any:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> Any:
        pixels = fn.decoders.image(fn.external_source(name="data"))
        if evaluation:
            return fn.crop(fn.resize(pixels, resize_shorter=SHORTER), crop=(SIZE, SIZE))
        begin, sides = (fn.external_source(name=name) for name in ("begin", "sides"))
        return fn.resize(fn.slice(pixels, begin, sides, axis_names="HW"), resize_x=SIZE, resize_y=SIZE)

    built = pipeline()
    built.build()
    return built


def dali(data: bytes, box: Box | None) -> np.ndarray:
    pipeline = dali_pipeline(box is None)
    pipeline.feed_input("data", [np.frombuffer(data, np.uint8)])
    if box:
        pipeline.feed_input("begin", [np.array([box[1], box[0]])])
        pipeline.feed_input("sides", [np.array([box[3] - box[1], box[2] - box[0]])])
    return np.asarray(pipeline.run()[0].as_tensor())[0]


SOURCES = {
    "torchvision (NUS-HPC)": Source(partial(torchvision, InterpolationMode.BILINEAR), "bilinear"),
    "DALI (NVIDIA's MLPerf points)": Source(dali, "bilinear", "nvidia.dali"),
    "OpenCV, area (FFCV)": Source(ffcv, "area"),
    "TensorFlow 1, bilinear (MLPerf's reference)": Source(
        partial(tensorflow1, "BILINEAR", False), "tf1_bilinear", "tensorflow"
    ),
    "TensorFlow 1, bicubic (Google's v1.0, dm-haiku)": Source(
        partial(tensorflow1, "BICUBIC", True), None, "tensorflow"
    ),
    "Pillow, bicubic (timm's evaluation)": Source(partial(torchvision, InterpolationMode.BICUBIC), None),
}
