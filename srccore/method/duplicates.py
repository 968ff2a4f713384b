"""Whether two texts say the same in almost the same words (reconstruction). Pure text processing.

What the search is after are responses that differ in one number, one name, one relation or one
negation: those contrasts are what a preference teaches. So two texts are duplicates only if they
are equal but for case, white space and punctuation, or if they are near as sequences of words and
all words that carry content are the same in the same order. Sets of words would not do: "the red
line is above the blue line" and its reverse have the same set.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher

__all__ = ["is_duplicate", "words"]

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+"
_LETTERS = r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*"
_TOKEN = re.compile(rf"{_NUMBER}|{_LETTERS}|\S")
# Between words, x-ray too; x-y is a difference.
_HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_]{2})|(?<=[^\W\d_]{2})-(?=[^\W\d_])")
# A label and not the article: "point A", but not "A point". The mark is content of its own.
_LABEL_A = re.compile(r"(?<=[^\s.!?:] )A\b")
_NOT = re.compile(r"n['\u2019]t\b")
# Operators, signs and units are not punctuation: "5 > 3" and "5 < 3" differ in nothing else.
_PUNCTUATION = frozenset(".,;:!?\"'`()[]{}\u2018\u2019\u201c\u201d\u2026\u2014")
# Beside a number or an operator, these are part of a calculation: 2*(3+4), 3:4, 5! / 2.
_OPERATORS = frozenset("()[]{}:!")
_CALCULATION = re.compile(r"[\d+*/^=<>-]")
_LINKING = frozenset(
    [
        "a",
        "an",
        "the",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "being",
        "it",
        "its",
        "there",
        "which",
        "so",
        "thus",
        "hence",
        "therefore",
        "then",
        "also",
        "and",
    ]
)
"""Words that carry no content of their own. Prepositions, pronouns of persons, comparisons, modal
verbs, quantifiers and negations do: none of them may differ."""


def is_duplicate(first: str, second: str, similarity: float) -> bool:
    """Whether two texts say the same; symmetric.

    Args:
        first: A text.
        second: A text.
        similarity: The least share of words in common, as sequences (`difflib`'s ratio: twice the
            number of matching words over the number of all words), of texts that are not equal.

    Returns:
        True if they have the same `words`, or if they are near and differ only in words that carry
        no content, such as articles. So numbers, names, relations and negations are the same and
        in the same order.
    """
    left, right = sorted((words(first), words(second)))
    if left == right:
        return True
    if _content(left) != _content(right):
        return False
    return SequenceMatcher(None, left, right, autojunk=False).ratio() >= similarity


def words(text: str) -> list[str]:
    """Splits a text into words, numbers and symbols, without case, white space and punctuation.

    Args:
        text: Any text.

    Returns:
        The words in order. ``1,000`` becomes ``1000`` and ``isn't`` becomes ``is``, ``not``; a
        hyphen between letters separates two words.
    """
    marked = text if text.isupper() else _LABEL_A.sub("A _", text)
    plain = _HYPHEN.sub(" ", _NOT.sub(" not", marked.casefold()))
    found = []
    for match in _TOKEN.finditer(plain):
        token = match.group()
        around = plain[max(0, match.start() - 1) : match.end() + 1]
        if token == "!":
            # A factorial goes on; a sentence has ended.
            around = plain[match.end() :].lstrip()[:1]
        if token not in _PUNCTUATION or (token in _OPERATORS and _CALCULATION.search(around)):
            found.append(token.replace(",", ""))
    return found


def _content(found: list[str]) -> list[str]:
    return [word for word in found if word not in _LINKING]
