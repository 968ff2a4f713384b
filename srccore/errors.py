"""The one kind of error that is written for users."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(Exception):
    """Something the user can fix: says what is wrong, where, and how to fix it.

    The command line prints it as one paragraph and exits with 2. Every other exception is a bug
    or a fault of the platform: it keeps its traceback and exits with 1.

    Args:
        what: What is wrong and where, as a sentence.
        fix: How to fix it, as a sentence.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what} {fix}".strip())
        self.what = what
        self.fix = fix
