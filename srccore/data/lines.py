"""Lines of a file from elsewhere, which may have no end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["bounded_lines"]


def bounded_lines(file: BinaryIO, most: int) -> Iterator[bytes | None]:
    """Yields each line with its end, or None for one that is too long.

    Args:
        file: An open file; a line that is too long is never in memory as a whole.
        most: Bytes that a line may have, without its end.
    """
    while line := file.readline(most + 1):
        if len(line) <= most or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(most)) and not rest.endswith(b"\n"):
            pass
        yield None
