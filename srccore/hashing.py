"""The hash behind every decision that must not depend on process, platform or order."""

from __future__ import annotations

import hashlib

__all__ = ["stable_hash"]


def stable_hash(text: str) -> int:
    """A 64-bit hash of a text that no process, platform or version changes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
