"""Text that comes from outside, so that a tokenizer reads nothing but text in it.

A question, a reference or a response may contain what a tokenizer reads as a control token: the end
of a turn, the start of another one, the place of an image. As a token, it would end the user's turn
in the middle of a question, or let a response speak for R-Scorer. Such marks are removed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from typing import Any

from srccore.errors import UserError

__all__ = ["control_tokens", "without_control_tokens"]

_ATTEMPTS = 8
"""How often marks that only show in the encoded text are removed. More are made to defeat it."""


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer: Any) -> frozenset[int]:
    """Returns the ids of a tokenizer's control tokens.

    Args:
        tokenizer: A tokenizer. What it writes for characters that it does not know is text.
    """
    return frozenset(_marked(tokenizer)) - {tokenizer.unk_token_id}


def _marked(tokenizer: Any) -> set[int]:
    known = tokenizer.added_tokens_decoder
    return {number for number, token in known.items() if token.special} | {
        *tokenizer.all_special_ids
    }


@functools.lru_cache(maxsize=8)
def _marks(tokenizer: Any) -> frozenset[str]:
    return frozenset(tokenizer.convert_ids_to_tokens(sorted(_marked(tokenizer))))


def without_control_tokens(tokenizer: Any, text: str, placeholders: Collection[str] = ()) -> str:
    """Removes from a text what the tokenizer would read as a control token.

    Args:
        tokenizer: The tokenizer that the text is for.
        text: The text.
        placeholders: Further marks to remove.

    Returns:
        The text, unchanged if it has no such mark. No control token comes out of encoding it.

    Raises:
        UserError: It consists of marks within marks, so that removing some makes others.
    """
    marks, ids = _marks(tokenizer) | frozenset(placeholders), control_tokens(tokenizer)
    text = _without(marks, text)
    for _ in range(_ATTEMPTS):
        # A tokenizer may normalise a text before it looks for marks.
        spans = _spans(tokenizer, text, ids)
        if not spans:
            return text
        for start, end in reversed(spans):
            text = text[:start] + text[end:]
        text = _without(marks, text)
    raise UserError(
        f"A text has control tokens of the model within control tokens: {text[:60]!r}.",
        "Remove them from the data set.",
    )


def _spans(tokenizer: Any, text: str, ids: Collection[int]) -> list[tuple[int, int]]:
    """Finds control tokens in an encoded text: where each starts and ends."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [(start, end) for number, (start, end) in pairs if number in ids and end > start]


def _without(marks: frozenset[str], text: str) -> str:
    """Removes marks, and those that come about by removing others, in one pass."""
    if not _pattern(marks).search(text):
        return text
    ends: dict[str, list[str]] = {}
    # The longest wins where one ends like another.
    for mark in sorted(marks, key=len, reverse=True):
        ends.setdefault(mark[-1], []).append(mark)
    kept: list[str] = []
    for letter in text:
        kept.append(letter)
        for mark in ends.get(letter, ()):
            if len(kept) >= len(mark) and "".join(kept[-len(mark) :]) == mark:
                del kept[-len(mark) :]
                break
    return "".join(kept)


@functools.lru_cache(maxsize=8)
def _pattern(marks: frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(marks))))
