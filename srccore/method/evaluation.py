"""Responses to a split, and the metrics of docs/method.md ("figures" in code and files). Pure.

Rationales are checked by program against the sample's facts, or else by the verdict of a judge. A
sample with neither is left out of the figures that look at rationales: ``judged`` says how many
samples those figures are based on, and they are null where it is 0.

Every figure is a ratio of two sums over the samples, so one bootstrap serves them all: resample
the samples once, then take two matrix products. The intervals cover the choice of samples only,
not the variation between training seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from srccore.data.records import Category, Judgement, Response, Sample
from srccore.errors import UserError
from srccore.method.engine import Draw, Node, Steps
from srccore.method.facts import check_rationale
from srccore.method.response import ParsedResponse, parse, same_answer

__all__ = [
    "FIGURES",
    "FIGURE_NAMES",
    "HEADLINE",
    "SHOWN",
    "Change",
    "Figure",
    "FigureSet",
    "Figures",
    "Outcome",
    "answer",
    "figures",
    "judge_responses",
    "paired_change",
    "parse_finished",
]

Interval = tuple[float, float]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """The verdict on one response."""

    sample_id: str
    category: Category
    parsed: bool
    answer_right: bool
    rationale_right: bool | None
    """None, like ``consistent``, for a sample that has neither facts nor a judgement."""
    consistent: bool | None
    """Whether the answer derived from the rationale alone equals the answer given."""
    token_count: int

    @property
    def is_judged(self) -> bool:
        """Whether there is a verdict on the rationale."""
        return self.rationale_right is not None


@dataclass(frozen=True)
class Figure:
    """Definition of a figure. A new one needs an entry in `FIGURES` and a field of `FigureSet`."""

    key: str
    """Its name in records and files."""
    heading: str
    short: str
    """The heading of a narrow column."""
    meaning: str
    """For readers of a report: one sentence without a full stop."""
    ratio: Callable[[Outcome], tuple[int, int]]
    """What one sample adds to the numerator and to the denominator."""
    better: Literal["higher", "lower"] | None = "higher"
    """None if neither direction is better."""
    unit: Literal["fraction", "tokens"] = "fraction"
    """Fractions are shown in percent."""


HEADLINE = "aligned_accuracy"
"""The figure that reports show first."""
FIGURES = (
    Figure(
        key="accuracy",
        heading="Accuracy",
        short="answer",
        meaning="Right answer",
        ratio=lambda outcome: (outcome.answer_right, 1),
    ),
    Figure(
        key="rationale_accuracy",
        heading="Rationale accuracy",
        short="rationale",
        meaning="Right rationale",
        ratio=lambda outcome: (outcome.rationale_right is True, outcome.is_judged),
    ),
    Figure(
        key=HEADLINE,
        heading="Aligned accuracy",
        short="aligned",
        meaning="Right answer and right rationale",
        ratio=lambda outcome: (
            outcome.answer_right and outcome.rationale_right is True,
            outcome.is_judged,
        ),
    ),
    Figure(
        key="spurious_correctness",
        heading="Spurious correctness",
        short="spurious",
        meaning="Right answers with a wrong rationale; lower is better",
        ratio=lambda outcome: (
            outcome.answer_right and outcome.rationale_right is False,
            outcome.answer_right and outcome.is_judged,
        ),
        better="lower",
    ),
    Figure(
        key="consistency",
        heading="Consistency",
        short="consist.",
        meaning="The rationale alone leads to the answer given",
        ratio=lambda outcome: (outcome.consistent is True, outcome.is_judged),
    ),
    Figure(
        key="format_rate",
        heading="Format rate",
        short="format",
        meaning="Responses that parse",
        ratio=lambda outcome: (outcome.parsed, 1),
    ),
    Figure(
        key="mean_tokens",
        heading="Mean length",
        short="tokens",
        meaning="Tokens per response",
        ratio=lambda outcome: (outcome.token_count, 1),
        better=None,
        unit="tokens",
    ),
)
"""All figures, in the order of ``figures.json``. Each has a bootstrap interval."""
FIGURE_NAMES = tuple(figure.key for figure in FIGURES)
SHOWN = tuple(sorted(FIGURES, key=lambda figure: figure.key != HEADLINE))
"""`FIGURES` in the order of reports: the headline first."""


class Change(BaseModel):
    """The change of a figure between two policies on the same samples: after minus before."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    difference: float
    interval: Interval
    """95% interval of the paired bootstrap."""


class FigureSet(BaseModel):
    """The figures over some samples: fractions in [0, 1], or null where they are undefined."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int
    judged: int
    """Samples with facts or a judgement: the basis of the four figures that look at rationales."""
    accuracy: float
    rationale_accuracy: float | None
    aligned_accuracy: float | None
    """The headline: both answer and rationale are right."""
    spurious_correctness: float | None
    """Share of right answers with a wrong rationale; null where no answer is right."""
    consistency: float | None
    format_rate: float
    mean_tokens: float
    interval: dict[str, Interval]
    """95% bootstrap percentile interval by figure; a null figure has none."""


class Figures(FigureSet):
    """The figures of one policy on the held-out split."""

    round: int
    """0 is the policy before the first round."""
    change: dict[str, Change] | None
    """By figure defined for both, against the previous policy; null if there is no previous one."""
    by_category: dict[Category, FigureSet]


def answer(root: Node, *, sample_id: str, max_tokens: int) -> Steps[Response]:
    """Answers one prompt greedily; for `srccore.method.driver.drive`.

    Args:
        root: The sample's prompt, in an engine.
        sample_id: The sample.
        max_tokens: The maximum number of tokens in the response.

    Yields:
        One draw.

    Returns:
        The response.
    """
    (found,) = yield [Draw(root, max_tokens, greedy=True, whole=True)]
    return Response(
        sample_id=sample_id,
        text=found.text.strip(),
        token_count=found.token_count,
        finished=found.stop == "end",
    )


def judge_responses(
    samples: Sequence[Sample],
    responses: Mapping[str, Response],
    judgements: Mapping[str, Judgement] | None = None,
) -> list[Outcome]:
    """Judges one response per sample: by the sample's facts, or else by a judge's verdict.

    Args:
        samples: The held-out samples.
        responses: One response per sample, by sample id.
        judgements: Judgements by sample id, for samples without facts; some may be missing.

    Returns:
        One outcome per sample, in the order of the samples. A response that does not parse is
        wrong in every respect.

    Raises:
        UserError: The responses belong to other samples.
    """
    ids = {sample.id for sample in samples}
    if odd := sorted(ids ^ responses.keys()):
        problem = "no response" if odd[0] in ids else "a response but is not in the split"
        raise UserError(
            f"The responses do not match the evaluated samples: {odd[0]} has {problem} "
            f"({len(odd)} mismatches in total).",
            "Pass all shards of the responses and the data set they were generated from.",
        )
    verdicts = judgements or {}
    return [_judge(sample, responses[sample.id], verdicts.get(sample.id)) for sample in samples]


def figures(
    outcomes: Sequence[Outcome],
    *,
    round: int,
    previous: Sequence[Outcome] | None,
    resamples: int,
    seed: int,
) -> Figures:
    """Computes the figures with intervals, by category and against the previous policy.

    Args:
        outcomes: At least one.
        round: The round that trained the policy; 0 for the policy before the first round.
        previous: The outcomes of the previous policy on the same samples, if there is one.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap. The same seed gives the same intervals, in whatever order the
            outcomes come.

    Returns:
        The figures.

    Raises:
        UserError: There are no outcomes, or the previous ones cover different samples.
    """
    if not outcomes:
        raise UserError("There are no responses to evaluate.", "Use a held-out split with samples.")
    groups = {
        category: [outcome for outcome in outcomes if outcome.category is category]
        for category in Category
    }
    change = None if previous is None else paired_change(previous, outcomes, resamples, seed)
    return Figures(
        **_figure_set(outcomes, resamples, seed).model_dump(),
        round=round,
        change=change,
        by_category={
            category: _figure_set(group, resamples, seed)
            for category, group in groups.items()
            if group
        },
    )


def paired_change(
    before: Sequence[Outcome], after: Sequence[Outcome], resamples: int, seed: int
) -> dict[str, Change]:
    """Compares two policies on the same samples by the paired bootstrap.

    The figures that look at rationales are compared over the samples that are judged for both
    policies: a judge may fail on different ones.

    Args:
        before: The outcomes of one policy.
        after: The outcomes of the other, in any order.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        The change by figure, for the figures that are defined for both policies on these samples.

    Raises:
        UserError: The two were evaluated on different samples.
    """
    if {each.sample_id for each in before} != {each.sample_id for each in after}:
        raise UserError(
            "The two evaluations cover different samples, so they cannot be compared in pairs.",
            "Evaluate both policies on the same held-out split.",
        )
    judged = [{each.sample_id for each in part if each.is_judged} for part in (before, after)]
    before, after = (_judged_only(part, judged[0] & judged[1]) for part in (before, after))
    weights = _resample(len(after), resamples, seed)
    everything = np.ones((1, len(after)))
    difference = _ratios(everything, after)[0] - _ratios(everything, before)[0]
    resampled = _ratios(weights, after) - _ratios(weights, before)
    return {
        name: Change(difference=float(difference[column]), interval=_interval(resampled[:, column]))
        for column, name in enumerate(FIGURE_NAMES)
        if not np.isnan(difference[column])
    }


def _judged_only(outcomes: Sequence[Outcome], ids: Collection[str]) -> list[Outcome]:
    """Takes the verdict on the rationale from all other outcomes."""
    return [
        each
        if each.sample_id in ids
        else dataclasses.replace(each, rationale_right=None, consistent=None)
        for each in outcomes
    ]


def parse_finished(response: Response) -> ParsedResponse | None:
    """Parses a response, unless it was cut at the maximum length.

    The end of a cut response may look like an answer: ``Answer: 1`` may have become 12.
    """
    return parse(response.text) if response.finished else None


def _judge(sample: Sample, response: Response, judgement: Judgement | None) -> Outcome:
    parsed = parse_finished(response)
    rationale_right: bool | None = None
    consistent: bool | None = None
    if sample.facts:
        check = check_rationale(parsed.rationale if parsed else "", sample.facts)
        rationale_right = check.is_sound
        consistent = _is_consistent(check.derived_answer, parsed)
    elif judgement is not None:
        rationale_right = judgement.rationale_right
        consistent = _is_consistent(judgement.derived_answer, parsed)
    return Outcome(
        sample_id=sample.id,
        category=sample.category,
        parsed=parsed is not None,
        answer_right=parsed is not None and same_answer(parsed.answer, sample.answer),
        rationale_right=rationale_right,
        consistent=consistent,
        token_count=response.token_count,
    )


def _is_consistent(derived: str | None, parsed: ParsedResponse | None) -> bool:
    if not derived or parsed is None:
        return False
    return same_answer(derived, parsed.answer)


def _figure_set(outcomes: Sequence[Outcome], resamples: int, seed: int) -> FigureSet:
    (point,) = _ratios(np.ones((1, len(outcomes))), outcomes)
    resampled = _ratios(_resample(len(outcomes), resamples, seed), outcomes)
    numbers = {
        name: None if np.isnan(number) else float(number)
        for name, number in zip(FIGURE_NAMES, point, strict=True)
    }
    interval = {
        name: _interval(resampled[:, column])
        for column, name in enumerate(FIGURE_NAMES)
        if numbers[name] is not None
    }
    judged = sum(outcome.is_judged for outcome in outcomes)
    return FigureSet.model_validate(
        {"n": len(outcomes), "judged": judged, **numbers, "interval": interval}
    )


def _resample(n: int, resamples: int, seed: int) -> Matrix:
    """Draws how often each sample occurs in each resample; shape (resamples, n)."""
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    drawn += n * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * n)
    return counts.reshape(resamples, n).astype(np.float64)


def _ratios(weights: Matrix, outcomes: Sequence[Outcome]) -> Matrix:
    """Computes the figures with weighted samples.

    Args:
        weights: Shape (resamples, n); the columns are the samples in the order of their ids.
        outcomes: In any order.

    Returns:
        Shape (resamples, figures), in the order of `FIGURES`; NaN where the denominator is 0.
    """
    rows = [
        [figure.ratio(outcome) for figure in FIGURES]
        for outcome in sorted(outcomes, key=lambda each: each.sample_id)
    ]
    table = np.array(rows, dtype=np.float64)  # (n, figures, 2)
    over, under = weights @ table[:, :, 0], weights @ table[:, :, 1]
    # Sums of integers are exact, so equal outcomes give equal ratios to the last bit.
    return np.divide(over, under, out=np.full_like(over, np.nan), where=under > 0)


def _interval(resampled: NDArray[np.float64]) -> Interval:
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return float(low), float(high)
