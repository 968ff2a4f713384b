r"""The text of a response: rationale, newline, ``Answer: <answer>`` (reconstruction).

The last line can always be parsed, so nothing has to guess where a rationale ends.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from srccore.data.texts import PUNCTUATION, answer_in

__all__ = [
    "ParsedResponse",
    "gives_answer",
    "has_rationale",
    "normalise_answer",
    "parse",
    "same_answer",
    "write",
]

ANSWER_PREFIX = "Answer: "
_ARTICLES = ("a ", "an ", "the ")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
        ]
    )
}


@dataclass(frozen=True)
class ParsedResponse:
    """A parsed response: the paper's rationale-answer pair."""

    rationale: str
    answer: str


def write(rationale: str, answer: str) -> str:
    """Writes a response in the form that the policy is to write.

    Args:
        rationale: One or more sentences; if empty, only the answer line is written.
        answer: The answer, one line.

    Returns:
        The text, which `parse` turns back into rationale and answer.
    """
    line = f"{ANSWER_PREFIX}{answer.strip()}"
    return f"{rationale.strip()}\n{line}" if rationale.strip() else line


def parse(text: str) -> ParsedResponse | None:
    """Parses a response.

    Args:
        text: What a policy wrote.

    Returns:
        Rationale and answer, or None unless the last line, and no other, is an answer line.
    """
    *head, last = text.strip().split("\n")
    answer = answer_in(last)
    if not answer or any(map(answer_in, head)):
        return None
    return ParsedResponse(rationale="\n".join(head).strip(), answer=answer)


def normalise_answer(answer: str) -> str:
    """Normalises an answer for comparison.

    Case, outer punctuation, white space and a leading article are ignored; numbers get a single
    form (``1,000.0`` becomes ``1000``, ``two`` becomes ``2``).

    Args:
        answer: Any text.

    Returns:
        The normal form; empty if nothing is left.
    """
    text = _inner(" ".join(answer.casefold().split()))
    text = _NUMBER_WORDS.get(text, text)
    if _NUMBER.fullmatch(text):
        plain = text.replace(",", "").lstrip("+")
        if "." in plain:
            plain = plain.rstrip("0").rstrip(".")
        sign, digits = ("-", plain[1:]) if plain.startswith("-") else ("", plain)
        digits = digits.lstrip("0") or "0"
        return ("" if digits == "0" else sign) + ("0" + digits if digits[0] == "." else digits)
    return text


def _inner(text: str) -> str:
    """Removes outer punctuation and leading articles, in one pass: an answer may be very long."""
    text = text.rstrip(PUNCTUATION)
    start, end = 0, len(text)
    while start < end:
        # A full stop before a digit is a decimal point.
        is_point = text[start] == "." and text[start + 1 : start + 2].isdigit()
        if text[start] in PUNCTUATION and not is_point:
            start += 1
        elif article := next((a for a in _ARTICLES if text.startswith(a, start)), ""):
            start += len(article)
        else:
            break
    return text[start:]


def same_answer(first: str, second: str) -> bool:
    """Whether two answers are equal after normalisation; an empty answer equals no other."""
    left = normalise_answer(first)
    return left != "" and left == normalise_answer(second)


def gives_answer(text: str, reference: str) -> bool:
    """Whether a response can be parsed and its answer equals the reference."""
    parsed = parse(text)
    return parsed is not None and same_answer(parsed.answer, reference)


def has_rationale(text: str) -> bool:
    """Whether a response parses into a rationale with at least one word, and an answer."""
    parsed = parse(text)
    return parsed is not None and any(letter.isalnum() for letter in parsed.rationale)
