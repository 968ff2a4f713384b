"""Hashes of texts and files: the same in every process, on every platform, in any order."""

from __future__ import annotations

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

    A file is read once per process, however often it is asked for and under whatever names: weights
    are gigabytes. It is read again when its size, its modification time or its inode has changed.
    """
    status = path.stat()
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if state not in _KNOWN:
        with path.open("rb") as file:
            _KNOWN[state] = hashlib.file_digest(file, "sha256").hexdigest()
    return _KNOWN[state]


_KNOWN: dict[tuple[int, int, int, int], str] = {}
