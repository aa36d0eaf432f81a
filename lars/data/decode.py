"""Image bytes to RGB pixels, within bounds: libjpeg-turbo for JPEGs, Pillow for everything that it refuses."""
from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageFile

MAX_PIXELS = 64_000_000  # ImageNet's largest image has 45 million; beyond this the bytes are hostile
MAX_BYTES = 32 * 2**20  # of one encoded image; ImageNet's largest has 15 MB
Image.MAX_IMAGE_PIXELS = None  # our own bound holds; Pillow's would only warn
ImageFile.LOAD_TRUNCATED_IMAGES = False
warnings.filterwarnings("ignore", module=r"PIL\.")  # damaged EXIF blocks in ImageNet are noise: nothing here reads EXIF


class BadImage(ValueError):
    """The bytes are no image that can be decoded within bounds."""


class Encoded:
    """An image that is not decoded yet: its size is known from the header, before any memory is taken for its pixels.

    Raises:
        BadImage: no bytes, no image, more than MAX_BYTES or MAX_PIXELS.
    """

    def __init__(self, data: bytes | memoryview | None) -> None:
        if not data:
            raise BadImage("no bytes")
        if len(data) > MAX_BYTES:
            raise BadImage(f"{len(data):,} bytes")
        self.data = data
        self.opened: Image.Image | None = None
        colours = "unknown"
        if data[:2] == b"\xff\xd8":  # CMYK (its colours are Adobe's, inverted or not) and what is no JPEG are left to Pillow
            try:
                self.height, self.width, colours, _ = simplejpeg.decode_jpeg_header(data)
            except ValueError:
                pass
        if colours not in ("YCbCr", "RGB", "Gray"):
            self._open()
        if self.width * self.height > MAX_PIXELS:
            raise BadImage(f"{self.width} x {self.height} pixels")

    def pixels(self, scale: float = 1.0, fast: bool = False) -> np.ndarray:
        """uint8 (height, width, 3) in RGB. A JPEG may come at 1/2, 1/4 or 1/8 of its size if that is no less than `scale`.

        Only these are quick: libjpeg-turbo has vector code for them and not for the eighths in between. At full size the
        pixels are Pillow's to the bit; `fast` repeats the chroma samples instead of interpolating them, which is 15 % faster
        and 1.4 of 255 off on average before the crop is resized.

        Raises:
            BadImage: cut off or damaged.
        """
        if self.opened is None:
            part = next((n for n in (8, 4, 2) if 1 / n >= scale), 1)
            try:
                return simplejpeg.decode_jpeg(self.data, "RGB", min_height=-(-self.height // part), min_width=-(-self.width // part), fastupsample=fast)
            except ValueError:  # also what libjpeg only warns of, as it does for some of ImageNet's files: Pillow decides
                self._open()
        try:
            if self.opened.mode.startswith("I"):  # 16 bits a pixel; Pillow's conversion would clip them
                grey = (np.asarray(self.opened).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.asarray(self.opened.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise many classes for damaged bytes
            raise BadImage(f"{type(error).__name__}: {error}") from None

    def _open(self) -> None:
        try:
            self.opened = Image.open(io.BytesIO(self.data))
        except Exception as error:
            raise BadImage(f"{type(error).__name__}: {error}") from None
        self.width, self.height = self.opened.size
