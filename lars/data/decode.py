"""Image bytes to a Pillow image in RGB, within bounds."""
from __future__ import annotations

import io
import warnings

from PIL import Image, ImageFile

MAX_PIXELS = 64_000_000  # ImageNet's largest image has 45 million; beyond this the bytes are hostile
Image.MAX_IMAGE_PIXELS = None  # our own bound below holds; Pillow's would only warn
ImageFile.LOAD_TRUNCATED_IMAGES = False


class BadImage(ValueError):
    """The bytes are no image that can be decoded within bounds."""


def decode(data: bytes | None, shorter: int | None = None) -> Image.Image:
    """Decode to RGB, whatever the file's own mode.

    shorter: a JPEG may be decoded at 1/2, 1/4 or 1/8 if its shorter side stays at least this many pixels.

    Raises:
        BadImage: no bytes, no image, cut off, or more than MAX_PIXELS.
    """
    if not data:
        raise BadImage("no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF blocks in ImageNet are noise: nothing here reads EXIF
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width} x {image.height} pixels")
            if shorter and image.format == "JPEG" and image.mode == "RGB":
                ratio = shorter / min(image.size)
                image.draft("RGB", (int(image.width * ratio) + 1, int(image.height * ratio) + 1))
            return image.convert("RGB")
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise many classes for damaged bytes
        raise BadImage(f"{type(error).__name__}: {error}") from None
