"""The rows of a JSON Lines file, and what a row of any format is.

The image paths in the file are relative to its folder; nothing outside that folder is opened.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from srccore.data.images import ImageError
from srccore.data.index import ImagePlace
from srccore.data.limits import MAX_LINE_BYTES
from srccore.data.lines import bounded_lines
from srccore.data.texts import shortened

__all__ = ["Row", "json_rows"]


@dataclass(frozen=True)
class Row:
    """A row as it was read, not yet checked."""

    number: int
    """Numbered from 1."""
    values: Mapping[str, Any]
    """The columns of a sample; null values are left out."""
    image: Callable[[], BinaryIO] | None = None
    """Opens the encoded image, or raises `ImageError`. None if it was not asked for, or if the row
    names no image that may be opened. Without a place or a path, it holds the image in memory."""
    place: ImagePlace | None = None
    """Where the image is, of a split with an index."""
    path: Path | None = None
    """The image's file, of a row of JSON Lines."""
    reasons: tuple[str, ...] = ()
    """What is already known to be wrong."""
    readable: bool = True
    """Whether the values are the row's."""


def json_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a JSON Lines file; its lines are the rows' numbers."""
    root = path.parent.resolve()
    with path.open("rb") as file:
        for number, line in enumerate(bounded_lines(file, MAX_LINE_BYTES), start=1):
            if line is None:
                reason = f"the line has more than {MAX_LINE_BYTES} bytes"
                yield Row(number, {}, reasons=(reason,), readable=False)
            elif line.strip():
                yield _json_row(number, line, root)


def _json_row(number: int, line: bytes, root: Path) -> Row:
    try:
        values = json.loads(line.decode(), object_pairs_hook=_object)
    except _RepeatedKeyError as error:
        return Row(number, {}, reasons=(str(error),), readable=False)
    except (ValueError, RecursionError) as error:
        return Row(number, {}, reasons=(f"the line is not JSON ({error})",), readable=False)
    if not isinstance(values, dict):
        return Row(number, {}, reasons=("the line is not a JSON object",), readable=False)
    name = values.pop("image", None)
    values = {key: value for key, value in values.items() if value is not None}
    try:
        path = _inside(root, name)
    except ImageError as error:
        return Row(number, values, reasons=(str(error),))
    return Row(number, values, functools.partial(_open, path), path=path)


class _RepeatedKeyError(ValueError):
    """An object has a key twice, of which `json` would keep the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _RepeatedKeyError(f"{shortened(twice)!r} is there twice")
    return values


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def _inside(root: Path, name: object) -> Path:
    """Resolves the path of an image file; nothing outside the root is ever opened."""
    if name is None:
        raise ImageError("image is missing")
    if not isinstance(name, str) or not name:
        raise ImageError("image is not a path")
    shown = repr(shortened(name, 300))
    try:
        path = (root / name).resolve()
        if Path(name).is_absolute() or not path.is_relative_to(root):
            raise ImageError(f"image path {shown} is outside the data set's folder")
        if not path.is_file():
            raise ImageError(f"image file {shown} is missing")
    # A null byte, a loop of symbolic links, a name that is too long, a folder without permission.
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"image path {shown} cannot be resolved ({reason})") from None
    return path
