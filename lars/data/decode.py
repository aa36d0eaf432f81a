"""Image bytes to RGB pixels, within bounds: libjpeg-turbo for JPEGs, Pillow for everything that it refuses.

Only what the bytes say makes an image bad, so that it is bad on every machine alike; memory that ran out is an error of
the machine. Orientation in EXIF is not applied and alpha is dropped, as where ImageNet is trained (docs/hostile.md).
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, TILELENGTH, TILEWIDTH, TiffImageFile

MAX_PIXELS = 64_000_000  # ImageNet's largest image has 45 million; beyond this the bytes are hostile
MAX_BYTES = 32 * 2**20  # of one encoded image; ImageNet's largest has 15 MB
_FORMATS = ("PNG", "WEBP", "GIF", "BMP", "PPM")  # beside JPEG and TIFF; none that starts a program, as EPS does
_MAX_SCANNED = 100 * MAX_PIXELS  # pixels of a JPEG times its scans, each of which passes over all of them
_MAX_NUMBERS = 2**20  # bytes of numbers in a TIFF's directory
_MAX_TILE = 2**24  # pixels; a tile takes its memory whatever the size of its image
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_NO_MEMORY = re.compile("out of memory|insufficient memory|memory allocation|decoder error -9", re.IGNORECASE)
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice as many, before it takes memory for a frame or a canvas
ImageFile.LOAD_TRUNCATED_IMAGES = False
warnings.filterwarnings("ignore", module=r"PIL\.")  # damaged EXIF blocks in ImageNet are noise: nothing here reads EXIF


class BadImage(ValueError):
    """The bytes are no image that can be decoded within bounds."""


class Encoded:
    """An image that is not decoded yet: its size is known from the header, before any memory is taken for its pixels.

    Raises:
        BadImage: no bytes, no image of a known format, more than MAX_BYTES or MAX_PIXELS.
    """

    def __init__(self, data: bytes | memoryview | None) -> None:
        if not data:
            raise BadImage("no bytes")
        if len(data) > MAX_BYTES:
            raise BadImage(f"{len(data):,} bytes")
        self.data = data
        self.opened: Image.Image | None = None
        colours, jpeg = "unknown", data[:2] == b"\xff\xd8"
        if jpeg:  # CMYK (its colours are Adobe's, inverted or not) and what is no JPEG are left to Pillow
            try:
                self.height, self.width, colours, _ = simplejpeg.decode_jpeg_header(data)
            except ValueError:
                pass
        if colours not in ("YCbCr", "RGB", "Gray"):
            self._open()
        if (pixels := self.width * self.height) > MAX_PIXELS:
            raise BadImage(f"{self.width} x {self.height} pixels")
        # A scan takes at least 10 bytes, so most images need not be searched for them.
        if jpeg and pixels * len(data) > 10 * _MAX_SCANNED and pixels * bytes(data).count(b"\xff\xda") > _MAX_SCANNED:
            raise BadImage("too many scans")

    def pixels(self, scale: float = 1.0, fast: bool = False) -> np.ndarray:
        """uint8 (height, width, 3) in RGB. A JPEG may come at 1/2, 1/4 or 1/8 of its size, but at no less than `scale`.

        Only these are quick: libjpeg-turbo has vector code for them and not for the eighths in between. At full size
        the pixels are Pillow's to the bit; `fast` repeats the chroma samples instead of interpolating them, which is
        15 % faster and 1.4 of 255 off on average before the crop is resized.

        Raises:
            BadImage: cut off or damaged.
            Exception: whatever else a decoder raises; it is not the image's fault.
        """
        if self.opened is None:
            part = next((n for n in (8, 4, 2) if 1 / n >= scale), 1)
            try:
                return simplejpeg.decode_jpeg(
                    self.data,
                    "RGB",
                    min_height=-(-self.height // part),
                    min_width=-(-self.width // part),
                    fastupsample=fast,
                )
            except ValueError as error:
                # Also what libjpeg only warns of, as it does for some of ImageNet's files: Pillow decides.
                if _NO_MEMORY.search(str(error)):
                    raise MemoryError(str(error)) from None
                self._open()
        try:
            return _rgb(self.opened)
        except Exception as error:
            raise _meaning(error) from None

    def _open(self) -> None:
        try:
            kind = {b"\xff\xd8": _Jpeg, b"II": _Tiff, b"MM": _Tiff}.get(bytes(self.data[:2]))
            stream = io.BytesIO(self.data)
            self.opened = kind(stream) if kind else Image.open(stream, formats=_FORMATS)
        except Exception as error:
            raise _meaning(error) from None
        if self.opened.mode == "F" or self.opened.mode == "I" and self.opened.format == "TIFF":
            raise BadImage("32-bit or signed pixels, and nothing says which value is white: store 8 or 16 bits")
        self.width, self.height = self.opened.size


class _Jpeg(JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Pillow would make objects of whatever a hostile EXIF block lists."""


class _Tiff(TiffImageFile):
    def _setup(self) -> None:
        """Refuse what costs far more than its bytes: Pillow makes objects of numbers, and libtiff takes whole tiles."""
        tags = self.tag_v2
        # Types 1, 2 and 7 are bytes.
        numbers = sum(len(value) for tag, value in tags._tagdata.items() if tags.tagtype[tag] not in (1, 2, 7))
        if numbers > _MAX_NUMBERS:
            raise BadImage(f"{numbers:,} bytes of numbers in its directory")
        if int(tags.get(TILEWIDTH, 1)) * int(tags.get(TILELENGTH, 1)) > _MAX_TILE:
            raise BadImage("tiles are too large")
        super()._setup()

    def load_end(self) -> None:
        """As Pillow's, which also reads all directories inside."""
        ImageOps.exif_transpose(self, in_place=True)


def _rgb(image: Image.Image) -> np.ndarray:
    image.load()
    if image.mode.startswith("I"):  # 16 bits a pixel, or 12 in a TIFF; Pillow's conversion would clip them
        bits = image.tag_v2.get(BITSPERSAMPLE, (16,))[0] if image.format == "TIFF" else 16
        return np.repeat((np.asarray(image) >> bits - 8).clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    rows = 2**22 // image.width + 1  # at a time: as a whole it would take the memory three times
    if rows >= image.height:
        return np.asarray(image.convert("RGB"))
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        strip = (0, top, image.width, min(top + rows, image.height))
        pixels[top : top + rows] = np.asarray(image.crop(strip).convert("RGB"))
    return pixels


def _meaning(error: Exception) -> Exception:
    """Of what a decoder raises: BadImage for damaged bytes, of which Pillow has many classes; else the error itself."""
    if (
        isinstance(error, BadImage)
        or not isinstance(error, _DAMAGE)
        or getattr(error, "errno", None) is not None
        or _NO_MEMORY.search(str(error))
    ):
        return error
    unknown = isinstance(error, UnidentifiedImageError)
    return BadImage(f"neither JPEG, TIFF, {', '.join(_FORMATS)}" if unknown else f"{type(error).__name__}: {error}")
