"""Checks a rationale against facts, without a model (reconstruction). Pure text processing.

Every sentence of a rationale is one claim. A claim that names the subject and relation of a fact
is *supported* or *contradicted* by it. Arithmetic, comparisons and parity are computed again: if
they are true and use only numbers that are facts or were derived before, they are *supported*;
otherwise they are an *invalid* step. Everything else is *unsupported*: it cannot be verified.

A rationale is sound if it states every needed fact and none of its claims is contradicted or
invalid; claims that cannot be verified do not count against it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from srccore.data.records import Fact, Sample
from srccore.method import sentences
from srccore.method.response import parse, same_answer

__all__ = ["Claim", "RationaleCheck", "Verdict", "check_rationale", "gold_rationale", "quality"]

_OPERATION = re.compile(r"(\d+) (plus|minus|times) (\d+) is (\d+)")
_COMPARISON = re.compile(r"(\d+) is (more|less) than (\d+)")
_PARITY = re.compile(r"(\d+) is (even|odd)")
_OPERATIONS = {
    "plus": lambda left, right: left + right,
    "minus": lambda left, right: left - right,
    "times": lambda left, right: left * right,
}


class Verdict(StrEnum):
    """What the facts say about one claim."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    INVALID = "invalid"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True)
class Claim:
    """One sentence of a rationale, what it concludes, and the verdict on it."""

    text: str
    verdict: Verdict
    value: str | None
    """What the claim states about its subject, if its form shows it."""
    fact: Fact | None = None
    """The fact that it is about, if any."""


@dataclass(frozen=True)
class RationaleCheck:
    """The result of checking a rationale against the facts of its sample."""

    claims: tuple[Claim, ...]
    missing: tuple[Fact, ...]
    """Needed facts that the rationale does not state correctly."""

    @property
    def is_sound(self) -> bool:
        """Every needed fact is stated, and no claim is contradicted or invalid."""
        wrong = (Verdict.CONTRADICTED, Verdict.INVALID)
        return (
            bool(self.claims)
            and not self.missing
            and not any(claim.verdict in wrong for claim in self.claims)
        )

    @property
    def derived_answer(self) -> str | None:
        """The answer that the rationale alone leads to: what its last claim concludes."""
        return self.claims[-1].value if self.claims else None


def check_rationale(rationale: str, facts: Sequence[Fact]) -> RationaleCheck:
    """Checks every claim of a rationale.

    Args:
        rationale: The text before the answer line.
        facts: The facts of the sample; without facts, no claim is supported by one.

    Returns:
        The claims with their verdicts, and the needed facts that are missing.
    """
    known = {fact.value for fact in facts if fact.visual and fact.value.isdigit()}
    claims: list[Claim] = []
    for sentence in sentences.split(rationale):
        claim = _check_claim(_plain(sentence), facts, known)
        claims.append(claim)
        if claim.verdict is Verdict.SUPPORTED and claim.value is not None:
            known.add(claim.value)
    stated = {id(claim.fact) for claim in claims if claim.verdict is Verdict.SUPPORTED}
    missing = tuple(fact for fact in facts if fact.needed and id(fact) not in stated)
    return RationaleCheck(tuple(claims), missing)


def gold_rationale(facts: Sequence[Fact]) -> str:
    """Writes the rationale that states the needed facts, in their order, and nothing else."""
    return " ".join(fact.sentence for fact in facts if fact.needed)


def quality(text: str, sample: Sample) -> float:
    """Scores a response by the facts (reconstruction).

    ``(supported needed facts - wrong claims - missing facts / 2) / needed facts``, plus 1 if the
    answer is right. A claim that repeats another one is also wrong.

    Args:
        text: The response.
        sample: The sample with its facts.

    Returns:
        At most 2 (everything right); there is no lower bound.
    """
    parsed = parse(text)
    check = check_rationale(parsed.rationale if parsed else text, sample.facts)
    needed = sum(fact.needed for fact in sample.facts)
    supported = [claim.text for claim in check.claims if claim.verdict is Verdict.SUPPORTED]
    wrong = len(check.claims) - len(set(supported))
    score = (needed - len(check.missing) - wrong - len(check.missing) / 2) / max(1, needed)
    return score + (parsed is not None and same_answer(parsed.answer, sample.answer))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(" .!?")


def _check_claim(text: str, facts: Sequence[Fact], known: set[str]) -> Claim:
    contradicted = None
    for fact in facts:
        head = f"{_plain(fact.subject)} {_plain(fact.relation)} "
        if text.startswith(head):
            value = text[len(head) :]
            if any(same_answer(value, name) for name in (fact.value, *fact.aliases)):
                return Claim(text, Verdict.SUPPORTED, value, fact)
            # Another fact may have the same subject and relation with the claimed value.
            contradicted = contradicted or Claim(text, Verdict.CONTRADICTED, value, fact)
    if contradicted is not None:
        return contradicted
    executed = _execute(text)
    if executed is not None:
        operands, result, is_true = executed
        verdict = Verdict.SUPPORTED if is_true and operands <= known else Verdict.INVALID
        return Claim(text, verdict, result)
    # "X is V" concludes V even if no fact is about it, as does "X is in V" if some fact has that
    # relation: consistency asks what follows from the rationale alone, right or wrong.
    relations = {"is", *(_plain(fact.relation) for fact in facts)}
    for relation in sorted(relations, key=lambda each: (-len(each), each)):
        _, is_found, concluded = text.rpartition(f" {relation} ")
        if is_found:
            return Claim(text, Verdict.UNSUPPORTED, concluded)
    return Claim(text, Verdict.UNSUPPORTED, None)


def _execute(text: str) -> tuple[set[str], str | None, bool] | None:
    if match := _OPERATION.fullmatch(text):
        left, name, right, result = match.groups()
        is_true = _OPERATIONS[name](int(left), int(right)) == int(result)
        return {left, right}, result, is_true
    if match := _COMPARISON.fullmatch(text):
        left, name, right = match.groups()
        is_true = int(left) > int(right) if name == "more" else int(left) < int(right)
        return {left, right}, None, is_true
    if match := _PARITY.fullmatch(text):
        number, name = match.groups()
        return {number}, name, int(number) % 2 == (name == "odd")
    return None
