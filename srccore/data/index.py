"""The index of a split: its texts, and where each image is in the Parquet file beside it.

``train.index.jsonl`` describes ``train.parquet``. With it, texts are read without the images, which
may still be in a bucket, and one image costs as many bytes as it has. Every line is an `Entry`; the
last one has the size of the Parquet file, so that an index that was cut off is noticed, and a file
that was written again by something else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pydantic import Field, ValidationError

from srccore.data.limits import MAX_IMAGE_BYTES
from srccore.data.records import Record, Sample
from srccore.errors import UserError

__all__ = [
    "Entry",
    "ImagePlace",
    "entry_at",
    "entry_line",
    "index_of",
    "is_indexed",
    "last_line",
    "read_index",
]

_SUFFIX = ".index.jsonl"
_LINE = 4096
"""Bytes that are read at a time; most lines are shorter."""
_LAST = re.compile(rb'^\{"size": (\d+)\}\n\Z', re.MULTILINE)


class ImagePlace(Record):
    """Where an encoded image is, and what is known of it."""

    file: str | None = None
    """The path of its file; None is the file that the index describes."""
    start: int = Field(ge=0)
    """The place of its first byte in the file."""
    length: int = Field(ge=0, le=MAX_IMAGE_BYTES)
    """Its size in bytes."""
    width: int = Field(gt=0)
    """In pixels, upright."""
    height: int = Field(gt=0)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Of the encoded image; None where it is not known."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, upright."""
        return self.width, self.height


class Entry(Record):
    """A sample and its image."""

    sample: Sample
    image: ImagePlace


def index_of(path: str) -> str:
    """Returns the path or URI of the index of a Parquet file."""
    return path.removesuffix(".parquet") + _SUFFIX


def is_indexed(path: Path) -> bool:
    """Whether a Parquet file has an index. The file itself need not be on this machine.

    Raises:
        UserError: The index describes another file.
    """
    index = Path(index_of(str(path)))
    if path.suffix != ".parquet" or not index.is_file():
        return False
    with index.open("rb") as lines:
        lines.seek(max(0, index.stat().st_size - 64))
        last = _LAST.search(lines.read())
    if last is None or (path.exists() and path.stat().st_size != int(last[1])):
        raise UserError(
            f"{index} does not describe {path}: one of them was changed or is damaged.",
            f"Delete {index} to read the file as it is, or run prepare-data again.",
        )
    return True


def entry_line(entry: Entry) -> bytes:
    """Returns a line of an index."""
    return entry.model_dump_json(exclude_none=True).encode() + b"\n"


def last_line(size: int) -> bytes:
    """Returns the last line of an index.

    Args:
        size: The size of the Parquet file, in bytes.
    """
    return f'{{"size": {size}}}\n'.encode()


def entry_at(lines: BinaryIO, start: int) -> Entry:
    """Reads one line; threads and forked processes may do so at once.

    Args:
        lines: An open index.
        start: The place of the line's first byte.
    """
    line = b""
    while b"\n" not in line:
        # Not with seek and read, which would move the position that they share.
        more = os.pread(lines.fileno(), _LINE, start + len(line))
        if not more:
            break
        line += more
    return Entry.model_validate_json(line.partition(b"\n")[0])


def read_index(path: Path) -> Iterator[tuple[int, Entry]]:
    """Reads the index of a Parquet file.

    Args:
        path: The Parquet file.

    Yields:
        The place of each line, in bytes, and what it says.

    Raises:
        UserError: A line is not an entry.
    """
    index = Path(index_of(str(path)))
    start = 0
    with index.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if _LAST.match(line):
                return
            try:
                yield start, Entry.model_validate_json(line)
            except ValidationError as error:
                raise UserError(
                    f"Line {number} of {index} is damaged: {error.errors()[0]['msg']}.",
                    "Run prepare-data again.",
                ) from None
            start += len(line)
