"""Where a sentence ends: the unit by which the search extends a response (reconstruction).

A sentence ends after ``.``, ``?`` or ``!`` (with closing quotes or brackets) if white space
follows, and before a newline. A full stop inside a number, or after a list number, an initial or
a known abbreviation does not end a sentence; "no.", "fig." and the like are abbreviations only
before a number. White space belongs to the sentence that follows it.
"""

from __future__ import annotations

import re

__all__ = ["first_end", "split"]

_ABBREVIATIONS = frozenset(
    [
        "mr",
        "mrs",
        "ms",
        "dr",
        "prof",
        "st",
        "jr",
        "sr",
        "vs",
        "etc",
        "approx",
        "e.g",
        "i.e",
        "cf",
        "al",
        "dept",
        "est",
        "min",
        "max",
        "avg",
        "temp",
        "inc",
        "ltd",
        "co",
        "u.s",
        "u.k",
        "u.n",
        "a.m",
        "p.m",
    ]
)
_NUMBERED = frozenset(["fig", "figs", "eq", "eqs", "no", "nos", "vol"])
# Closing characters are straight and curly quotes, and brackets. Starting where a run starts, and
# giving nothing back, keeps this linear: a text may be a megabyte of full stops.
_END = re.compile(r"""(?<![.?!])[.?!]++["'\u201d\u2019)\]]*+(?=\s)|(?<=\S)(?=\n)""")
_WORD_BEFORE = re.compile(r"([A-Za-z](?:[A-Za-z.]*[A-Za-z])?|\d+)\.$")
_LONGEST_WORD = 16
"""Characters before a full stop that are looked at: no abbreviation or list number is longer."""
_SPACE = re.compile(r"\s*")


def first_end(text: str, start: int = 0) -> int | None:
    """Finds the end of the first sentence, if the text continues after it.

    Args:
        text: Any text; a sentence that nothing follows has not ended yet.
        start: Where the sentence begins.

    Returns:
        The index right after the sentence, or None.
    """
    start = _after_space(text, start)
    for match in _END.finditer(text, start):
        end = match.end()
        if text[end] == "\n" or not _is_abbreviation(text, start, end):
            return end
    return None


def split(text: str) -> list[str]:
    """Splits a text into its sentences, without the white space around them.

    Args:
        text: Any text.

    Returns:
        The sentences in order; none is empty.
    """
    sentences, start = [], 0
    while (end := first_end(text, start)) is not None:
        sentences.append(text[start:end].strip())
        start = end
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences


def _after_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    assert match is not None  # It matches nothing, too.
    return match.end()


def _is_abbreviation(text: str, start: int, end: int) -> bool:
    """Whether the full stop before ``end`` belongs to a word instead of ending a sentence."""
    sentence = text[max(start, end - _LONGEST_WORD) : end]
    match = _WORD_BEFORE.search(sentence)
    if match is None:
        return False
    word = match.group(1)
    is_list_number = word.isdigit() and end - start == len(word) + 1
    is_initial = len(word) == 1 and word.isupper() and end - start > 2
    # If nothing follows it yet, it may still turn out to be one.
    next_word = _after_space(text, end)
    following = text[next_word : next_word + 1]
    is_numbered = word.lower() in _NUMBERED and (not following or following.isdigit())
    return is_list_number or is_initial or is_numbered or word.lower() in _ABBREVIATIONS
