"""Decoding anything a user has, safely, to RGB uint8; what cannot be read says why in a few words.

One decoder, Pillow, for every format. OpenCV decodes a JPEG of 512 x 512 in 1.0 ms where Pillow takes 1.4,
with equal pixels, but on damaged files its codecs write to the process's stderr, which no caller can silence
from a thread. The difference is a thousandth of what encoding an image and its nine views costs on a CPU.
Pillow's libtiff does the same, and can be told not to.
"""

import ctypes
import io
import logging
import time
import warnings
from pathlib import Path

import numpy as np
import PIL
from jaxtyping import UInt8
from PIL import Image, ImageFile, UnidentifiedImageError

MAX_PIXELS = 2**27
"""Largest width x height that is decoded (134 million: above any camera's, 400 MB as RGB)."""

SECONDS = 30.0
"""Processor time that a file may take (any camera's takes a few seconds): some small files would take hours."""

STEP = 4096
"""Bytes that a JPEG's decoder gets at a time."""

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
"""What is read. An explicit list, because Pillow knows formats that start other programs (EPS)."""

_MAGIC = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"RIFF": "WebP",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112
_TILE = (322, 323)
"""Tags of a TIFF's tile: width and height."""

Image.init()  # registers every format now: doing so on first use is not safe from several threads
# Pillow silences libtiff's warnings and leaves its errors, which it raises as well; its wheels bring the library along.
for _libtiff in Path(PIL.__file__).parents[1].glob("pillow.libs/libtiff*"):
    ctypes.CDLL(str(_libtiff)).TIFFSetErrorHandler(None)
# What Pillow logs goes to whoever listens; without a listener Python would print it.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class Unreadable(Exception):
    """The bytes are no image that can be used; `str` is a short reason for a person."""


class _Metered(io.BytesIO):
    """A file in memory that ends the decoding of what takes too long: ten thousand scans, a million empty chunks.

    Every parser and decoder of Pillow that can be made to work for long comes here for more, the JPEG's in `STEP`s;
    what the others (WebP, AVIF, TIFF) do is bounded by the pixels, which are checked before.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.end = time.thread_time() + SECONDS

    def read(self, size: int | None = -1) -> bytes:
        if time.thread_time() > self.end:
            raise Unreadable(f"takes more than {SECONDS:g} s to decode")
        return super().read(size)


def decode(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Bytes of an image file to upright RGB pixels, 0 to 255.

    The first frame of an animation; transparency composited over white; 16 bits scaled so that 65535 becomes
    255; CMYK, YCCK and palettes converted; the Exif orientation applied. The declared size is checked before
    any pixel is decoded. Raises Unreadable, and nothing else, for bytes of any kind; shows no warning.
    """
    if not data:
        raise Unreadable("the file is empty")
    _silence_pillow()
    try:
        with Image.open(_Metered(data), formats=FORMATS) as image:
            _check_size(*image.size)
            if image.format == "TIFF":  # a tile is decoded whole, however little of it is seen
                _check_size(*(image.tag_v2.get(tag, 1) for tag in _TILE))
            if image.format in ("JPEG", "MPO"):
                image.decodermaxblock = STEP
            return np.array(_rgb(image))
    except Unreadable:
        raise
    except Image.DecompressionBombError:
        raise Unreadable(f"declares more than the {MAX_PIXELS:,} pixels that are decoded") from None
    except UnidentifiedImageError:
        raise Unreadable(_unidentified(data)) from None
    except Exception as error:  # on damaged bytes Pillow raises nearly any type: SyntaxError, zlib.error, ...
        raise Unreadable(_damaged(data, error)) from error


def resize(image: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Squash to a square of `size` pixels, no crop, as paper A does.

    Antialiased bicubic: the default of PIL's `Image.resize` (which the paper's code calls) and the filter of
    CLIP's own preprocessing. An image that already has the size is returned as it is.
    """
    if image.shape[:2] == (size, size):
        return image
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def _rgb(image: ImageFile.ImageFile) -> Image.Image:
    image.load()
    orientation = _orientation(image)
    if image.mode.startswith("I") or image.mode == "F":
        rgb = _deep_grey(image)
    elif image.has_transparency_data:
        rgb = Image.new("RGBA", image.size, "white")
        rgb.alpha_composite(image.convert("RGBA"))
    else:
        rgb = image
    rgb = rgb if rgb.mode == "RGB" else rgb.convert("RGB")
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _deep_grey(image: ImageFile.ImageFile) -> Image.Image:
    """One channel of more than 8 bits to grey. Pillow's own conversion clips at 255 instead of scaling."""
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))):
        raise Unreadable(f"{image.format} of mode {image.mode} has no defined white; 8 or 16 bits are read")
    values = np.asarray(image).astype(np.int64)
    grey = ((values * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _orientation(image: ImageFile.ImageFile) -> int:
    """Exif orientation, 1 to 8. Read after loading: for TIFF Pillow has then applied and removed it."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a damaged Exif block raises nearly any type, and the picture may well be fine
        return 1


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Unreadable(f"declares {width:,} x {height:,} pixels; at most {MAX_PIXELS:,} are decoded")
    if width * height == 0:
        raise Unreadable("declares no pixels")


def _kind(data: bytes) -> str | None:
    if data[4:11] == b"ftypavi":
        return "AVIF"
    return next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)


def _unidentified(data: bytes) -> str:
    if kind := _kind(data):
        return f"its {kind} header is broken or cut off"
    if data[4:8] == b"ftyp":
        return "a HEIC photograph or a video: convert it to JPEG or PNG"
    if data.lstrip().startswith(b"<"):
        return "a web page or a drawing in text, not pixels"
    return f"not an image that is read here ({', '.join(FORMATS)})"


def _damaged(data: bytes, error: Exception) -> str:
    kind = _kind(data) or "image"
    said = " ".join(str(error).split())[:120] or type(error).__name__
    return f"cut off: the {kind} ends early" if "truncated" in said.lower() else f"damaged {kind}: {said}"


def _silence_pillow() -> None:
    """Keep Pillow's remarks on damaged files off the screen: what matters of them is in the reason.

    A lasting filter, not `catch_warnings`, which is not safe from threads; set again if another came before it.
    """
    first = warnings.filters[0][3] if warnings.filters else None  # the module it is for
    if getattr(first, "pattern", None) != r"PIL\.":
        warnings.filterwarnings("ignore", module=r"PIL\.")
