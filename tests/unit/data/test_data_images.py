"""Encoded images: what their headers say is what decoding gives."""

from __future__ import annotations

import io
import zlib

import pytest
from PIL import Image

from srccore.data.images import decode, measure

ORIENTATION = 0x0112


def encoded(form: str, **settings: object) -> bytes:
    """An image of 4 x 2 pixels whose left half is red."""
    image = Image.new("RGB", (4, 2), "blue")
    image.paste("red", (0, 0, 2, 2))
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[ORIENTATION] = orientation
    return made


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright_as_pillow_does(form: str, orientation: int) -> None:
    from PIL import ImageOps

    data = encoded(form, exif=exif(orientation), lossless=True)
    with Image.open(io.BytesIO(data)) as image:
        wanted = ImageOps.exif_transpose(image).convert("RGB")
    found = decode(data)
    assert (found.size, found.tobytes()) == (wanted.size, wanted.tobytes())
    assert measure(data) == found.size


def test_a_size_is_that_of_the_decoded_image_if_a_png_has_exif_behind_its_pixels() -> None:
    plain = encoded("PNG")
    chunk = b"eXIf" + exif(6).tobytes().removeprefix(b"Exif\x00\x00")
    packed = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    data = plain[:-12] + packed + plain[-12:]
    assert measure(data) == decode(data).size == (4, 2)


def test_a_size_is_that_of_the_decoded_image_if_a_png_is_turned_by_xmp() -> None:
    from PIL.PngImagePlugin import PngInfo

    text = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", text)
    data = encoded("PNG", pnginfo=info)
    assert measure(data) == decode(data).size
