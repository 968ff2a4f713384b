"""The one error kind that a user is meant to read."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(Exception):
    """Something the user can mend: says what is wrong, where, and how to mend it.

    The command line prints it as one paragraph and exits with 2. Every other exception is a
    defect or a fault of the platform: it keeps its traceback and exits with 1.

    Args:
        what: What is wrong and where, as a sentence.
        mend: How to mend it, as a sentence.
    """

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(f"{what} {mend}")
        self.what = what
        self.mend = mend
