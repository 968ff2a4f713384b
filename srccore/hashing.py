"""Hashes of texts and files: the same in every process, on every platform, in any order."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

__all__ = ["hash_file", "hash_text", "stable_hash"]


def stable_hash(text: str) -> int:
    """Returns a 64-bit hash of a text that no process, platform or version changes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def hash_text(text: str) -> str:
    """Returns the SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hex.

    A file is read once per process, however often it is asked for: weights are gigabytes. It is
    read again when its size, its modification time or its inode has changed.
    """
    status = path.stat()
    return _hash_file(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino)


@functools.cache
def _hash_file(path: str, _size: int, _mtime: int, _inode: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
