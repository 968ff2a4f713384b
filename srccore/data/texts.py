"""What the texts of a sample may be, so that a response made of them can be read back.

A response ends with one answer line (`srccore.method.response`). So an answer is one line, and no
line of a rationale is an answer line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from srccore.data.limits import MAX_CHARACTERS, MAX_FACT_CHARACTERS, MAX_ITEMS
from srccore.data.records import Fact

__all__ = ["PUNCTUATION", "answer_in", "problems_of", "problems_of_facts", "shortened"]

PUNCTUATION = " .,;:!?\"'`()[]"
"""What an answer may have around it without being another one."""
_ANSWER = re.compile(r"\s*answer\s*:", re.IGNORECASE)


def answer_in(line: str) -> str:
    """Returns the answer in a line of a response; empty if it is no answer line."""
    match = _ANSWER.match(line)
    return line[match.end() :].strip() if match else ""


def shortened(text: str, most: int = 60) -> str:
    """Shortens a text of a data set for a message, to so many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def problems_of(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Checks the texts of a row.

    Args:
        values: The row's columns; what is not text is not looked at.

    Yields:
        The column, and what is wrong with it.
    """
    for name, limit in MAX_CHARACTERS.items():
        text = values.get(name)
        if not isinstance(text, str):
            continue
        if len(text) > limit:
            yield name, f"{name} has {len(text):,} characters, more than {limit:,}"
        elif not text.strip() and name != "rationale":
            yield name, f"{name} is empty"
        elif name == "answer" and "\n" in text.strip():
            yield name, "answer has several lines, but a response ends with one answer line"
        elif name == "answer" and not "".join(text.split()).strip(PUNCTUATION):
            yield name, f"answer is nothing but punctuation ({text.strip()!r}), which is ignored"
        elif name == "rationale" and any(map(answer_in, text.split("\n"))):
            yield name, "rationale has a line that starts with 'Answer:'; the answer has a column"


def problems_of_facts(facts: tuple[Fact, ...]) -> Iterator[str]:
    """Checks the size of a sample's facts.

    Yields:
        What is wrong.
    """
    if len(facts) > MAX_ITEMS:
        yield f"there are {len(facts):,} facts, more than {MAX_ITEMS}"
    for number, fact in enumerate(facts[:MAX_ITEMS]):
        if len(fact.aliases) > MAX_ITEMS:
            yield f"facts.{number} has {len(fact.aliases):,} aliases, more than {MAX_ITEMS}"
        texts = (fact.subject, fact.relation, fact.value, *fact.aliases[:MAX_ITEMS])
        if (longest := max(map(len, texts))) > MAX_FACT_CHARACTERS:
            yield (
                f"facts.{number} has a text of {longest:,} characters, "
                f"more than {MAX_FACT_CHARACTERS:,}"
            )
