"""Ratings to preferences: the confidence-weighted best and worst candidate of each sample. Pure.

The paper aggregates the confidences of the pairwise verdicts; how is a reconstruction (see
docs/method.md). The best candidate is only the best of what the search found, so it is also
compared with the reference response. A sample gives at most one preference; every sample that gives
none is counted under its reason. Ties are broken by candidate id, which is a hash of the text, so
neither the order of the candidates nor that of the ratings can change a preference.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import permutations

from pydantic import BaseModel, ConfigDict

from srccore.config import CurationConfig
from srccore.data.records import (
    REFERENCE,
    CandidateSet,
    Category,
    Preference,
    Rating,
    Sample,
)
from srccore.errors import UserError
from srccore.method import scoring
from srccore.method.response import gives_answer
from srccore.method.scoring import FoldedPair

__all__ = ["CurationFigures", "CurationResult", "Reason", "curate", "values"]


class Reason(StrEnum):
    """Why a sample gives no preference: the first that applies, in this order."""

    TOO_FEW_CANDIDATES = "too_few_candidates"
    NO_REFERENCE = "no_reference"
    """There is nothing to judge its responses against, so they were not rated."""
    EQUAL_TEXTS = "equal_texts"
    SMALL_MARGIN = "small_margin"
    CHOSEN_ANSWER_WRONG = "chosen_answer_wrong"
    REJECTED_ANSWER_RIGHT = "rejected_answer_right"
    """Only with ``answer_gate: strict``."""
    WORSE_THAN_REFERENCE = "worse_than_reference"
    """The best of what the search found is clearly worse than the reference response."""
    NOT_KEPT = "not_kept"
    """Cut by ``keep_fraction``."""


class CurationFigures(BaseModel):
    """What the report shows about a curation. A mean over nothing is null."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int
    preferences: int
    by_category: dict[Category, int]
    """Preferences of each category."""
    length_difference: float | None
    """Mean of chosen minus rejected, in tokens."""
    mean_margin: float | None
    """Over the preferences, like ``mean_confidence``."""
    mean_confidence: float | None
    swap_consistency: float | None
    """Over all ratings."""
    unanchored: int
    """Preferences whose chosen response was not compared with a reference."""
    margins: tuple[float, ...]
    """Of every sample that was rated, kept or not: helps to choose `min_margin`."""
    confidences: tuple[float, ...]
    """Of the same samples, in the same order."""
    anchors: tuple[float, ...]
    """The verdicts on chosen against reference, of those samples that have a reference: helps to
    choose `anchor_tolerance`."""


@dataclass(frozen=True)
class CurationResult:
    """The preferences in the order of the candidate sets, and why there are not more."""

    preferences: tuple[Preference, ...]
    reasons: dict[Reason, int]
    """How many samples gave none for each reason; every reason is listed."""
    figures: CurationFigures


def values(
    candidate_ids: Sequence[str], folded: Mapping[tuple[str, str], FoldedPair]
) -> dict[str, float]:
    """Values each candidate against all others: ``v_i = sum_j c_ij * m_ij / (N - 1)``.

    Dividing by the sum of c instead would cancel the confidence: two candidates about which
    R-Scorer is unsure would get the full margin (reconstruction).

    Args:
        candidate_ids: The candidates of one sample, at least two.
        folded: The verdicts of `scoring.fold_ratings`.

    Returns:
        The value of each candidate, in [-1, 1].
    """
    return {
        candidate: math.fsum(
            folded[candidate, other].weighted for other in candidate_ids if other != candidate
        )
        / (len(candidate_ids) - 1)
        for candidate in candidate_ids
    }


def curate(
    samples: Mapping[str, Sample],
    candidate_sets: Iterable[CandidateSet],
    ratings: Iterable[Rating],
    config: CurationConfig,
    unrated: Collection[str] = (),
) -> CurationResult:
    """Picks a preference for each sample whose ratings are clear enough.

    Args:
        samples: The samples by id.
        candidate_sets: What the search found.
        ratings: Both orders of all pairs of `scoring.pair_schedule`.
        config: Minimum margin, answer gate, comparison with the reference, share to keep.
        unrated: Ids of samples that were not rated because they have no reference.

    Returns:
        The preferences, the reasons for dropping samples, and the report's figures.

    Raises:
        UserError: A sample is unknown, or its ratings do not match its candidates.
    """
    by_sample: defaultdict[str, list[Rating]] = defaultdict(list)
    for rating in ratings:
        by_sample[rating.sample_id].append(rating)
    sets = list(candidate_sets)
    found: list[Preference] = []
    good: list[Preference] = []
    dropped: Counter[Reason] = Counter()
    for candidate_set in sets:
        sample = _sample_of(samples, candidate_set)
        if len(candidate_set.candidates) < 2:
            dropped[Reason.TOO_FEW_CANDIDATES] += 1
            continue
        if sample.id in unrated:
            dropped[Reason.NO_REFERENCE] += 1
            continue
        preference = _compare(candidate_set, by_sample[sample.id], config)
        found.append(preference)
        reason = _why_not(preference, sample, config)
        if reason is None:
            good.append(preference)
        else:
            dropped[reason] += 1
    kept = _keep(good, samples, config.keep_fraction)
    dropped[Reason.NOT_KEPT] = len(good) - len(kept)
    return CurationResult(
        preferences=tuple(kept),
        reasons={reason: dropped[reason] for reason in Reason},
        figures=_figures(samples, len(sets), kept, found, by_sample),
    )


def _sample_of(samples: Mapping[str, Sample], candidate_set: CandidateSet) -> Sample:
    sample = samples.get(candidate_set.sample_id)
    if sample is None:
        raise UserError(
            f"The candidates refer to sample {candidate_set.sample_id}, which is not in the data "
            "set.",
            "Pass the data set that the search ran on.",
        )
    return sample


def _compare(
    candidate_set: CandidateSet, ratings: Sequence[Rating], config: CurationConfig
) -> Preference:
    """Compares the best candidate with the one to reject, if the sample gives a preference."""
    by_id = {candidate.id: candidate for candidate in candidate_set.candidates}
    folded = scoring.fold_ratings(ratings)
    pairs = set(permutations(by_id, 2))
    anchored = pairs | {pair for name in by_id for pair in ((name, REFERENCE), (REFERENCE, name))}
    if folded.keys() not in (pairs, anchored):
        raise UserError(
            f"The ratings of sample {candidate_set.sample_id} do not cover all pairs of its "
            f"{len(by_id)} candidates, or refer to others.",
            "Pass the candidates and the ratings of one round, from all its shards.",
        )
    value = values(list(by_id), folded)
    # One ranking for both ends: even if all values are equal, the two differ.
    ranked = sorted(by_id, key=lambda candidate: (-value[candidate], candidate))
    chosen, rejected = ranked[0], ranked[-1]
    if config.rejected == "likeliest":
        worse = [name for name in ranked[1:] if folded[chosen, name].weighted >= config.min_margin]
        # The worst is often a text that the policy would hardly write anyway.
        rejected = min(
            worse, key=lambda name: (-by_id[name].log_probability, name), default=rejected
        )
    certainties = [
        verdict.certainty
        for (first, second), verdict in folded.items()
        if first < second and {first, second} & {chosen, rejected} and (first, second) in pairs
    ]
    return Preference(
        sample_id=candidate_set.sample_id,
        chosen=by_id[chosen],
        rejected=by_id[rejected],
        margin=folded[chosen, rejected].weighted,
        confidence=math.fsum(certainties) / len(certainties),
        anchor=folded[chosen, REFERENCE].weighted if folded.keys() == anchored else None,
    )


def _why_not(preference: Preference, sample: Sample, config: CurationConfig) -> Reason | None:
    if preference.chosen.text.split() == preference.rejected.text.split():
        return Reason.EQUAL_TEXTS
    if preference.margin < config.min_margin:
        return Reason.SMALL_MARGIN
    if config.answer_gate != "off" and not gives_answer(preference.chosen.text, sample.answer):
        return Reason.CHOSEN_ANSWER_WRONG
    if config.answer_gate == "strict" and gives_answer(preference.rejected.text, sample.answer):
        return Reason.REJECTED_ANSWER_RIGHT
    if preference.anchor is not None and preference.anchor < -config.anchor_tolerance:
        return Reason.WORSE_THAN_REFERENCE
    return None


def _keep(
    preferences: Sequence[Preference], samples: Mapping[str, Sample], fraction: float
) -> list[Preference]:
    """Cuts every category by the same fraction, so that their mixture stays the same."""
    by_category: defaultdict[Category, list[Preference]] = defaultdict(list)
    for preference in preferences:
        by_category[samples[preference.sample_id].category].append(preference)
    kept: set[str] = set()
    for group in by_category.values():
        group.sort(key=lambda each: (-each.margin * each.confidence, each.sample_id))
        # 0.1 * 30 is slightly more than 3 in floating point, which must not round up to 4.
        count = math.ceil(fraction * len(group) - 1e-9)
        kept.update(each.sample_id for each in group[:count])
    return [each for each in preferences if each.sample_id in kept]


def _figures(
    samples: Mapping[str, Sample],
    sample_count: int,
    kept: Sequence[Preference],
    found: Sequence[Preference],
    ratings: Mapping[str, Sequence[Rating]],
) -> CurationFigures:
    categories = Counter(samples[each.sample_id].category for each in kept)
    return CurationFigures(
        samples=sample_count,
        preferences=len(kept),
        by_category={category: categories[category] for category in Category},
        length_difference=_mean(
            [each.chosen.token_count - each.rejected.token_count for each in kept]
        ),
        mean_margin=_mean([each.margin for each in kept]),
        mean_confidence=_mean([each.confidence for each in kept]),
        swap_consistency=scoring.swap_consistency(
            rating for group in ratings.values() for rating in group
        ),
        unanchored=sum(each.anchor is None for each in kept),
        margins=tuple(each.margin for each in found),
        confidences=tuple(each.confidence for each in found),
        anchors=tuple(each.anchor for each in found if each.anchor is not None),
    )


def _mean(numbers: Sequence[float]) -> float | None:
    return math.fsum(numbers) / len(numbers) if numbers else None
