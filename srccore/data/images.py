"""Encoded images: opened, measured and decoded, and rejected if they are too large.

The limit is checked on an image's header, before anything is decoded.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from srccore.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MAX_IMAGE_PIXELS", "ImageError", "decode", "measure", "opened", "upright_size"]

# Pillow's other readers are rarely used and less safe (EPS runs Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_IMAGE_PIXELS = 40_000_000
"""Larger images are rejected: decoding one could exhaust the memory."""


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
        with warnings.catch_warnings():
            # The limit is checked below, where the message can name it.
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(file, formats=_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_IMAGE_PIXELS:
                    raise ImageError(
                        f"image is too large: {width} x {height} pixels, "
                        f"more than {MAX_IMAGE_PIXELS}"
                    )
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


def upright_size(image: Image) -> tuple[int, int]:
    """Reads width and height as `decode` returns them, from the header alone."""
    from PIL.ExifTags import Base

    # A PNG that has no EXIF data yet would be decoded to look for some behind its pixels.
    seen = image.format != "PNG" or "exif" in image.info
    turned = seen and image.getexif().get(Base.Orientation) in (5, 6, 7, 8)
    width, height = image.size
    return (height, width) if turned else (width, height)


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
    from PIL import ImageOps

    with opened(io.BytesIO(encoded)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")
