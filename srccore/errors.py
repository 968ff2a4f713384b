"""The one kind of error that is written for users."""

from __future__ import annotations

from srccore.shown import shown

__all__ = ["UserError"]


class UserError(Exception):
    """Something the user can fix: says what is wrong, where, and how to fix it.

    The command line prints it as one paragraph and exits with 2. Every other exception is a bug
    or a fault of the platform: it keeps its traceback and exits with 1. Both sentences may quote
    texts from elsewhere: they are shown without control characters and passwords in URLs.

    Args:
        what: What is wrong and where, as a sentence.
        fix: How to fix it, as a sentence.
    """

    def __init__(self, what: str, fix: str) -> None:
        self.what = shown(what)
        self.fix = shown(fix)
        super().__init__(f"{self.what} {self.fix}".strip())
