"""What R-Scorer is asked, and how its ratings are read. Pure, over a `RatingEngine`.

R-Scorer sees no image: the text it judges against is in its prompt. Every ordered pair of a
sample's candidates is rated, and every candidate against the sample's reference response. The two
orders of a pair are folded into one verdict, in which a rating that flips with the order counts for
less. All sums are exact (`math.fsum`), so the order of candidates, pairs and levels cannot matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from srccore.config import MAX_CANDIDATES
from srccore.data.records import (
    RATING_LEVELS,
    REFERENCE,
    Candidate,
    CandidateSet,
    LabelledPair,
    Rating,
    Sample,
)
from srccore.errors import UserError
from srccore.method.engine import RatingEngine
from srccore.method.facts import gold_rationale
from srccore.method.response import gives_answer, write

__all__ = [
    "FoldedPair",
    "certainty_of",
    "fold",
    "fold_ratings",
    "mean_mass",
    "pair_schedule",
    "preference_of",
    "rate_candidates",
    "rating_prompt",
    "reference_rationale",
    "reference_response",
    "swap_consistency",
    "validate",
    "verdict",
]


@dataclass(frozen=True)
class FoldedPair:
    """Both orders of a pair as one verdict, from the point of view of its first candidate."""

    margin: float
    """In [-1, 1]: how much better the first candidate is."""
    certainty: float
    """In [0, 1]: how certain R-Scorer is, and how little the order matters to it."""

    @property
    def weighted(self) -> float:
        """Certainty times margin, in [-1, 1]: the same scale for any number of candidates."""
        return self.certainty * self.margin


def reference_rationale(sample: Sample) -> str | None:
    """What responses to a sample are judged against (reconstruction).

    Args:
        sample: The sample.

    Returns:
        Its reference rationale, or its needed facts as sentences; None if it has neither.
    """
    return sample.rationale or gold_rationale(sample.facts) or None


def reference_response(sample: Sample) -> str | None:
    """Writes the response that gives a sample's reference rationale and answer.

    Args:
        sample: The sample.

    Returns:
        The response, or None if the sample has no `reference_rationale`.
    """
    rationale = reference_rationale(sample)
    return None if rationale is None else write(rationale, sample.answer)


def rating_prompt(sample: Sample, first_text: str, second_text: str) -> str:
    """Writes the user message in which R-Scorer reads two responses (reconstruction).

    Args:
        sample: The sample; the responses are judged against its reference answer and its
            `reference_rationale`.
        first_text: The first response.
        second_text: The second response.

    Returns:
        Five lines with short labels, since a small model reads them. The chat template adds the
        rest.
    """
    lines = {
        "Question": sample.question,
        "Reference": sample.answer,
        "Facts": reference_rationale(sample) or "none",
        "First": first_text,
        "Second": second_text,
    }
    return "\n".join(f"{label}: {' '.join(text.splitlines())}" for label, text in lines.items())


def pair_schedule(
    sample: Sample, candidates: Sequence[Candidate]
) -> list[tuple[Candidate, Candidate]]:
    """Lists the pairs to rate (reconstruction).

    All ordered pairs of candidates. If the sample has a `reference_response`, it takes part as an
    anchor: each candidate is also rated against it, in both orders.

    Args:
        sample: The sample.
        candidates: Its candidates.

    Returns:
        ``N * (N - 1)`` pairs, and ``2 * N`` with the reference, whose id is `REFERENCE`; none for
        fewer than two candidates.

    Raises:
        UserError: There are more than `MAX_CANDIDATES`.
    """
    if len(candidates) > MAX_CANDIDATES:
        raise UserError(
            f"A sample has {len(candidates)} candidates, but at most {MAX_CANDIDATES} are rated.",
            f"Search again with search.candidates={MAX_CANDIDATES} or fewer.",
        )
    pairs = list(permutations(candidates, 2))
    text = reference_response(sample)
    if pairs and text is not None:
        reference = _as_candidate(REFERENCE, text)
        pairs += [
            pair
            for candidate in candidates
            for pair in ((candidate, reference), (reference, candidate))
        ]
    return pairs


def rate_candidates(
    engine: RatingEngine, samples_and_sets: Sequence[tuple[Sample, CandidateSet]]
) -> list[Rating]:
    """Rates all pairs of `pair_schedule` of some samples, in one call to the engine.

    Args:
        engine: R-Scorer.
        samples_and_sets: Samples, each with the candidates that the search found for it.

    Returns:
        The ratings, sample by sample in the order of `pair_schedule`.

    Raises:
        UserError: A sample has more candidates than `pair_schedule` accepts.
    """
    return _rate(
        engine,
        [
            (sample, first, second)
            for sample, candidate_set in samples_and_sets
            for first, second in pair_schedule(sample, candidate_set.candidates)
        ],
    )


def _rate(
    engine: RatingEngine, pairs: Sequence[tuple[Sample, Candidate, Candidate]]
) -> list[Rating]:
    if not pairs:
        return []
    distributions = engine.next_token_distribution(
        [rating_prompt(sample, first.text, second.text) for sample, first, second in pairs],
        [str(level) for level in RATING_LEVELS],
    )
    ratings = []
    for (sample, first, second), distribution in zip(pairs, distributions, strict=True):
        one, two, three, four, five = distribution.probabilities
        rating = Rating(
            sample_id=sample.id,
            first=first.id,
            second=second.id,
            probabilities=(one, two, three, four, five),
            mass=distribution.mass,
        )
        ratings.append(rating)
    return ratings


def validate(
    engine: RatingEngine, samples: Mapping[str, Sample], pairs: Sequence[LabelledPair]
) -> dict[str, float | int | None]:
    """Compares R-Scorer with the teacher on pairs that it was not trained on (reconstruction).

    Args:
        engine: R-Scorer.
        samples: The samples by id.
        pairs: The teacher's ratings; each is read in both orders.

    Returns:
        ``teacher_agreement``, three-way, over both orders; ``teacher_agreement_both_right``, the
        same over pairs whose answers are both right; ``swap_consistency``; ``rating_mass``;
        ``length_slope``, rating per word of length difference, by least squares through 0;
        ``validation_pairs`` and ``validation_pairs_both_right``.
    """
    asked = []
    for pair in pairs:
        sample = samples[pair.sample_id]
        first, second = (_as_candidate(text, text) for text in (pair.first, pair.second))
        asked += [(sample, first, second), (sample, second, first)]
    ratings = _rate(engine, asked)
    agrees, agrees_both_right, lengths, means = [], [], [], []
    for number, (sample, first, second) in enumerate(asked):
        pair = pairs[number // 2]
        wanted = pair.rating - 3 if number % 2 == 0 else 3 - pair.rating
        found = verdict(ratings[number].probabilities)
        agrees.append(found == (wanted > 0) - (wanted < 0))
        if all(gives_answer(text.text, sample.answer) for text in (first, second)):
            agrees_both_right.append(agrees[-1])
        lengths.append(len(first.text.split()) - len(second.text.split()))
        means.append(_mean(ratings[number].probabilities))
    square = math.fsum(length * length for length in lengths)
    slope = math.fsum(n * m for n, m in zip(lengths, means, strict=True)) / square if square else 0
    return {
        "teacher_agreement": _share(agrees),
        "teacher_agreement_both_right": _share(agrees_both_right),
        "swap_consistency": swap_consistency(ratings),
        "rating_mass": mean_mass(ratings),
        "length_slope": slope,
        "validation_pairs": len(pairs),
        "validation_pairs_both_right": len(agrees_both_right) // 2,
    }


def _as_candidate(name: str, text: str) -> Candidate:
    return Candidate(id=name, text=text, log_probability=0.0, token_count=1)


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def preference_of(probabilities: Sequence[float]) -> float:
    """Preference for the first candidate: ``(sum_r r * p_r - 3) / 2`` (reconstruction).

    Args:
        probabilities: Over the rating tokens 1..5.

    Returns:
        A number in [-1, 1], exactly negated if the probabilities are reversed.
    """
    return _mean(probabilities) / 2


def certainty_of(probabilities: Sequence[float]) -> float:
    """Returns how certain a rating is: ``max(0, 1 - sd / sqrt 2)`` (reconstruction).

    The standard deviation reflects that {1, 5} is less certain than {4, 5}; entropy does not.

    Args:
        probabilities: Over the rating tokens 1..5.

    Returns:
        A number in [0, 1]: 1 for a certain rating, 0 for a uniform or wider distribution.
    """
    mean = _mean(probabilities)
    squares = [
        probability * (level - 3 - mean) ** 2
        for level, probability in zip(RATING_LEVELS, probabilities, strict=True)
    ]
    variance = math.fsum(squares) / math.fsum(probabilities)
    return max(0.0, 1 - math.sqrt(variance / 2))


def fold(forward: Rating, backward: Rating) -> FoldedPair:
    """Folds the two orders of a pair into one verdict (reconstruction).

    ``m = (m_ij - m_ji) / 2`` and ``c = (c_ij + c_ji) / 2 * (1 - |m_ij + m_ji| / 2)``.

    Args:
        forward: First against second.
        backward: Second against first.

    Returns:
        The verdict, from the point of view of the first candidate of ``forward``.
    """
    there = preference_of(forward.probabilities)
    back = preference_of(backward.probabilities)
    certainty = (certainty_of(forward.probabilities) + certainty_of(backward.probabilities)) / 2
    return FoldedPair((there - back) / 2, certainty * (1 - abs(there + back) / 2))


def fold_ratings(ratings: Iterable[Rating]) -> dict[tuple[str, str], FoldedPair]:
    """Folds all ratings of one sample.

    Args:
        ratings: Both orders of every pair, in any order.

    Returns:
        The verdict by (first, second); (second, first) has it with the margin negated.

    Raises:
        UserError: An order of a pair is missing or occurs twice.
    """
    by_pair: dict[tuple[str, str], Rating] = {}
    for rating in ratings:
        if (rating.first, rating.second) in by_pair:
            raise UserError(
                f"Sample {rating.sample_id} has two ratings of {rating.first} against "
                f"{rating.second}.",
                "Pass each file of ratings once, all from one round.",
            )
        by_pair[rating.first, rating.second] = rating
    for (first, second), rating in by_pair.items():
        if (second, first) not in by_pair:
            raise UserError(
                f"Sample {rating.sample_id} has no rating of {second} against {first}, "
                "only in the other order.",
                "Score the sample's candidates again: both orders of a pair are needed.",
            )
    return {
        (first, second): fold(rating, by_pair[second, first])
        for (first, second), rating in by_pair.items()
    }


def verdict(probabilities: Sequence[float]) -> int:
    """Reads a rating three-way (reconstruction).

    Args:
        probabilities: Over the rating tokens 1..5.

    Returns:
        1 if the first is better ({4, 5} together are the most likely), -1 if the second is
        better ({1, 2}), 0 if they are equal ({3}, or a tie).
    """
    one, two, equal, four, five = probabilities
    better, worse = four + five, one + two
    if better > max(equal, worse):
        return 1
    if worse > max(equal, better):
        return -1
    return 0


def swap_consistency(ratings: Iterable[Rating]) -> float | None:
    """Returns the share of pairs on which the two orders agree three-way.

    Args:
        ratings: Ratings of any number of samples; pairs with only one order are left out.

    Returns:
        A fraction, or None if no pair has both orders.
    """
    verdicts = {
        (rating.sample_id, rating.first, rating.second): verdict(rating.probabilities)
        for rating in ratings
    }
    agree = [
        found == -verdicts[sample_id, second, first]
        for (sample_id, first, second), found in verdicts.items()
        if first < second and (sample_id, second, first) in verdicts
    ]
    return sum(agree) / len(agree) if agree else None


def mean_mass(ratings: Iterable[Rating]) -> float | None:
    """Returns the mean share of the full softmax on the rating tokens: a health figure.

    Args:
        ratings: Ratings of any number of samples.

    Returns:
        A fraction, or None if there are no ratings.
    """
    masses = [rating.mass for rating in ratings]
    return math.fsum(masses) / len(masses) if masses else None


def _mean(probabilities: Sequence[float]) -> float:
    """Returns the mean rating minus 3, centred so that mirrored ratings negate it exactly."""
    weighted = [
        (level - 3) * probability
        for level, probability in zip(RATING_LEVELS, probabilities, strict=True)
    ]
    return math.fsum(weighted) / math.fsum(probabilities)
