"""Encoded images: opened, measured and decoded, and rejected if they are too large.

The limits (`srccore.data.limits`) are checked on an image's header, before anything is decoded.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from srccore.data.limits import (
    MAX_ASPECT_RATIO,
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PIXELS,
    MAX_IMAGE_SIDE,
)
from srccore.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageError", "decode", "measure", "opened", "upright_size"]

# Pillow's other readers are rarely used and less safe (EPS runs Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class ImageError(Exception):
    """Why an image cannot be used, without a full stop."""


@contextmanager
def opened(file: BinaryIO) -> Iterator[Image]:
    """Yields the image of a file, not yet decoded.

    Args:
        file: The encoded image.

    Raises:
        ImageError: It is not an image, is too large, or the block failed to decode it.
    """
    import PIL.Image

    try:
        _ignore_warning()
        size = file.seek(0, io.SEEK_END)
        if size > MAX_IMAGE_BYTES:
            raise ImageError(f"image is too large: {size} bytes, more than {MAX_IMAGE_BYTES}")
        file.seek(0)
        with PIL.Image.open(file, formats=_FORMATS) as image:
            _check_pixels(*image.size)
            yield image
    except (ImageError, UserError, MemoryError):
        raise
    except PIL.Image.DecompressionBombError:
        raise ImageError(f"image is too large: more than {MAX_IMAGE_PIXELS} pixels") from None
    except PIL.UnidentifiedImageError:
        names = ", ".join(_FORMATS)
        raise ImageError(f"image is corrupt or in none of the formats {names}") from None
    except Exception as error:  # Pillow's readers raise all kinds of errors on broken bytes.
        raise ImageError(f"image is corrupt ({error})") from error


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        limit = f"{MAX_IMAGE_PIXELS}"
    elif max(width, height) > MAX_IMAGE_SIDE:
        limit = f"{MAX_IMAGE_SIDE} on a side"
    elif max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            f"image is too narrow: {width} x {height} pixels, more than {MAX_ASPECT_RATIO} to 1"
        )
    else:
        return
    raise ImageError(f"image is too large: {width} x {height} pixels, more than {limit}")


@functools.cache
def _ignore_warning() -> None:
    """Silences Pillow about large images: `opened` has a limit of its own.

    For good, because a filter for a while is not safe where threads open images.
    """
    import PIL.Image

    warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


def upright_size(image: Image) -> tuple[int, int]:
    """Reads width and height as `decode` returns them, from the header alone."""
    width, height = image.size
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def _orientation(image: Image) -> int:
    """Reads the orientation of an image that has not been decoded: 1 to 8, as EXIF has it.

    What a PNG has behind its pixels is not looked for: it would have to be decoded.
    """
    from PIL.ExifTags import Base

    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return int(image.getexif().get(Base.Orientation, 1))


def measure(encoded: bytes) -> tuple[int, int]:
    """Returns width and height of an encoded image, upright, without decoding it.

    Raises:
        ImageError: It is not an image, or is too large.
    """
    with opened(io.BytesIO(encoded)) as image:
        return upright_size(image)


def decode(encoded: bytes) -> Image:
    """Returns an image as RGB, rotated upright according to its EXIF data.

    Raises:
        ImageError: It cannot be decoded.
    """
    from PIL.Image import Transpose

    upright = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    with opened(io.BytesIO(encoded)) as image:
        # Before it is decoded, as `upright_size` does: then Pillow may find another one.
        turn = upright.get(_orientation(image))
        found = image if turn is None else image.transpose(turn)
        if found.mode == "I" or found.mode.startswith("I;16"):
            # Grey values of 16 bits, of which `convert` would make white all above 255.
            found = found.point(lambda value: value * (1 / 256)).convert("L")
        return found.convert("RGB")
