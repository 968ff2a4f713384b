"""Files that are written whole or not at all, folders that one process works on at a time.

And the names that stages and storage share.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srccore.errors import UserError

__all__ = [
    "JOURNAL",
    "LOCK",
    "MANIFEST",
    "STARTED",
    "Hold",
    "atomically",
    "full_disk_explained",
    "hold",
    "is_json",
    "is_leftover",
    "is_private",
    "sync",
    "writable",
    "write_json",
]

STARTED = "stage.json"
"""In a stage's folder from its beginning: whose folder it is."""
MANIFEST = "manifest.json"
"""In a stage's folder once it is finished."""
JOURNAL = "journal.jsonl"
"""What an unfinished stage has done so far."""
LOCK = ".lock"
"""In a folder that a process works on, or has worked on."""


def is_private(path: Path) -> bool:
    """Whether a file of a stage only concerns the process that works on it.

    Args:
        path: Relative to the stage's folder.
    """
    return path.name in (JOURNAL, LOCK) or any(part.endswith(".tmp") for part in path.parts)


def is_leftover(path: Path, name: str) -> bool:
    """Whether a file is what a process left that was killed while it began a folder.

    Args:
        path: A file in the folder.
        name: The first file that is written there.
    """
    return path.name == LOCK or (path.name.startswith(f"{name}.") and path.suffix == ".tmp")


def is_json(path: Path) -> bool:
    """Whether a file was written completely; a power cut can leave an empty or shorter one."""
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return True


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, survives a power cut."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some file systems cannot do that for a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def atomically(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Replaces a file when the block ends, and leaves it alone if the block fails.

    Args:
        path: The file; its folder must exist.
        durable: Whether it must survive a power cut; what is only a copy need not.

    Yields:
        The temporary file to write, in the same folder.
    """
    # Random: pods that write one file of a shared volume are all process 1.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if durable:
            # Otherwise the new name may survive a power cut, and the content not.
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
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


class Hold:
    """A folder that no other process works on, as long as this object exists."""

    def __init__(self, opened: int) -> None:
        """Keeps an open and locked file, which is unlocked when it is closed."""
        weakref.finalize(self, os.close, opened)


_HELD: weakref.WeakValueDictionary[Path, Hold] = weakref.WeakValueDictionary()
_HOLDING = threading.Lock()


def hold(folder: Path, *, wait: bool = True) -> Hold:
    """Keeps other processes on this file system from working on a folder.

    A process that holds a folder may hold it again. A killed process holds nothing.

    Args:
        folder: The folder, which must exist.
        wait: Whether to wait for a process that holds it, instead of raising an error.

    Returns:
        What to keep for as long as the work takes.

    Raises:
        UserError: Another process holds it.
        OSError: The folder cannot be written.
    """
    place = folder.resolve()
    with _HOLDING:
        held = _HELD.get(place)
        if held is None:
            opened = os.open(place / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock(opened, folder, wait)
            except BaseException:
                os.close(opened)
                raise
            held = _HELD[place] = Hold(opened)
    return held


def _lock(opened: int, folder: Path, wait: bool) -> None:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise UserError(
                f"Another process is working on {folder}.",
                "Wait until it has ended, or choose another --out; nothing was changed.",
            ) from None
        print(f"Another process is working on {folder}: waiting for it.", file=sys.stderr)
        fcntl.flock(opened, fcntl.LOCK_EX)
    except OSError as error:
        # Some network file systems have no locks; one process per folder is the rule anyway.
        print(f"Working on {folder} without a lock: {error.strerror}.", file=sys.stderr)
