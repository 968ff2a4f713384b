"""Texts from elsewhere as messages and pages show them: nothing hidden, and no password.

Data sets, models, teachers, other people's runs and object stores choose texts that end up in a
terminal or a page. Control characters could move its cursor, change its colours or the direction
of the text around them; a URL may have a password in it.
"""

from __future__ import annotations

import re

__all__ = ["has_credentials", "shown", "visible", "without_credentials"]

# Control characters, and those that change or hide the direction of text (bidi controls, tags).
# Ordinary joiners stay: scripts and emoji need them. Lone surrogates cannot be encoded as UTF-8,
# and a lone carriage return overwrites its line.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]|\r(?!\n)"
)
_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s@]*@")


def visible(text: str) -> str:
    """Replaces characters that a terminal or browser would obey by their code points."""
    return _UNSAFE.sub(lambda found: f"⟨U+{ord(found.group()):04X}⟩", text)


def has_credentials(text: str) -> bool:
    """Whether there is a URL with a user name or password in a text."""
    return _CREDENTIALS.search(text) is not None


def without_credentials(text: str) -> str:
    """Removes user names and passwords from the URLs in a text."""
    return _CREDENTIALS.sub("", text)


def shown(text: str) -> str:
    """Makes a text fit for a message: `visible`, and `without_credentials`."""
    return visible(without_credentials(text))
