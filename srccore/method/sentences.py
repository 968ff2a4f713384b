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
# Closing characters are straight and curly quotes, and brackets.
_END = re.compile(r"""[.?!]+["'\u201d\u2019)\]]*(?=\s)|(?<=\S)(?=\n)""")
_WORD_BEFORE = re.compile(r"([A-Za-z](?:[A-Za-z.]*[A-Za-z])?|\d+)\.$")


def first_end(text: str) -> int | None:
    """Finds the end of the first sentence, if the text continues after it.

    Args:
        text: Any text; a sentence that nothing follows has not ended yet.

    Returns:
        The index right after the sentence, or None.
    """
    start = len(text) - len(text.lstrip())
    for match in _END.finditer(text, start):
        end = match.end()
        if text[end] == "\n" or not _is_abbreviation(text[start:end], text[end:].lstrip()):
            return end
    return None


def split(text: str) -> list[str]:
    """Splits a text into its sentences, without the white space around them.

    Args:
        text: Any text.

    Returns:
        The sentences in order; none is empty.
    """
    sentences = []
    while (end := first_end(text)) is not None:
        sentences.append(text[:end].strip())
        text = text[end:]
    return [*sentences, text.strip()] if text.strip() else sentences


def _is_abbreviation(sentence: str, rest: str) -> bool:
    match = _WORD_BEFORE.search(sentence)
    if match is None:
        return False
    word = match.group(1)
    is_list_number = word.isdigit() and len(sentence) == len(word) + 1
    is_initial = len(word) == 1 and word.isupper() and len(sentence) > 2
    # If nothing follows it yet, it may still turn out to be one.
    is_numbered = word.lower() in _NUMBERED and (not rest or rest[0].isdigit())
    return is_list_number or is_initial or is_numbered or word.lower() in _ABBREVIATIONS
