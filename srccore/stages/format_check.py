"""Whether stage 1 took: the share of a policy's responses that have a rationale and an answer.

Everything after stage 1 is expensive, and of no use if responses cannot be parsed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from srccore.data.records import Response
from srccore.errors import UserError
from srccore.method.response import has_rationale

__all__ = ["BATCH_TOKENS", "FORMAT_SAMPLES", "MAX_TOKENS", "check_format", "format_rate"]

FORMAT_SAMPLES = 64
"""Responses that are looked at: enough to tell a policy that mostly follows the format from one
that mostly does not (reconstruction)."""
BATCH_TOKENS = 8192
"""Of the prompts that are answered together."""
MAX_TOKENS = 1024
"""More than a search allows by default: a long rationale must not look like a missing answer."""


def format_rate(responses: Sequence[Response]) -> float:
    """Returns the share of the responses that end, with a rationale and an answer."""
    return sum(_has_format(each) for each in responses) / len(responses)


def check_format(responses: Sequence[Response], least: float, out: Path) -> None:
    """Refuses a policy whose responses mostly cannot be parsed.

    Args:
        responses: Some responses of the policy.
        least: The smallest share that must have the format (`rationale.min_format_rate`).
        out: The stage's folder, for the error.

    Raises:
        UserError: Fewer have it.
    """
    rate = format_rate(responses)
    if rate >= least:
        return
    example = next(each for each in responses if not _has_format(each))
    raise UserError(
        f"Stage 1 did not take: {rate:.0%} of {len(responses)} responses have a rationale and then "
        f"an answer line, and rationale.min_format_rate is {least:g}. The response to "
        f"{example.sample_id}, for example: {example.text[:300]!r}.",
        "Train more: raise rationale.samples, rationale.epochs or rationale.learning_rate, in "
        "another folder. If the responses are good enough, run the same command with --set "
        f"rationale.min_format_rate={int(rate * 100) / 100:g}: the training in {out} is not done "
        "again.",
    )


def _has_format(each: Response) -> bool:
    return each.finished and has_rationale(each.text)
