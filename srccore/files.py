"""Files that are written whole or not at all, and the names that stages and storage share."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srccore.errors import UserError

__all__ = [
    "JOURNAL",
    "MANIFEST",
    "STARTED",
    "atomically",
    "full_disk_explained",
    "writable",
    "write_json",
]

STARTED = "stage.json"
"""In a stage's folder from its beginning: whose folder it is."""
MANIFEST = "manifest.json"
"""In a stage's folder once it is finished."""
JOURNAL = "journal.jsonl"
"""What an unfinished stage has done so far."""


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Replaces a file when the block ends, and leaves it alone if the block fails.

    Args:
        path: The file; its folder must exist.

    Yields:
        The temporary file to write, in the same folder.
    """
    # Random: pods that write one file of a shared volume are all process 1.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def writable(path: Path, option: str = "--out") -> Iterator[None]:
    """Explains why an output cannot be written.

    Args:
        path: The file or folder that the block writes to.
        option: How the user named it.

    Raises:
        UserError: The block raised an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write to {path}: {error.strerror}.",
            f"Choose another {option}, free some space or fix the permissions.",
        ) from None


@contextmanager
def full_disk_explained() -> Iterator[None]:
    """Explains that a file could not be written for want of space, wherever it was noticed.

    Raises:
        UserError: The block failed for that reason.
    """
    try:
        yield
    except Exception as error:
        # Libraries in Rust have an error of their own, which quotes the system's.
        is_full = isinstance(error, OSError) and error.errno in _FULL
        if not is_full and not any(f"(os error {number})" in str(error) for number in _FULL):
            raise
        filename = getattr(error, "filename", None)
        raise UserError(
            f"There is no space left to write {filename or 'a file'} ({error}).",
            "Free some space or raise the quota, then do the same again: it resumes from what was "
            "written whole.",
        ) from error
