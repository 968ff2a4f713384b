import itertools
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from srccore.config import CurationConfig
from srccore.data.records import (
    REFERENCE,
    Candidate,
    CandidateSet,
    Category,
    Rating,
    Sample,
)
from srccore.errors import UserError
from srccore.method.curation import CurationResult, Reason, curate, values
from srccore.method.scoring import FoldedPair, fold_ratings

Five = tuple[float, float, float, float, float]
LEVELS: dict[int, Five] = {
    5: (0, 0, 0, 0, 1),
    4: (0, 0, 0, 1, 0),
    3: (0, 0, 1, 0, 0),
    2: (0, 1, 0, 0, 0),
    1: (1, 0, 0, 0, 0),
}
UNIFORM: Five = (0.2, 0.2, 0.2, 0.2, 0.2)
RIGHT, WRONG = "It is so.\nAnswer: 3", "It is not so.\nAnswer: 4"


def sample(sample_id: str = "s", category: Category = Category.MATH) -> Sample:
    return Sample(id=sample_id, category=category, question="How many?", answer="3")


def candidates(sample_id: str, *texts: str) -> CandidateSet:
    """Candidates a, b, c, ...; the first has 10 tokens, each further one has one token less."""
    found = tuple(
        Candidate(id=name, text=text, log_probability=-1, token_count=10 - number)
        for number, (name, text) in enumerate(zip("abcdefgh", texts, strict=False))
    )
    return CandidateSet(sample_id=sample_id, candidates=found)


def both_orders(sample_id: str, first: str, second: str, probabilities: Five) -> list[Rating]:
    one, two, three, four, five = probabilities
    orders = [(first, second, probabilities), (second, first, (five, four, three, two, one))]
    return [
        Rating(sample_id=sample_id, first=left, second=right, probabilities=p, mass=1)
        for left, right, p in orders
    ]


def curate_one(*texts: str, level: int = 5, config: CurationConfig | None = None) -> CurationResult:
    return curate(
        {"s": sample()},
        [candidates("s", *texts)],
        both_orders("s", "a", "b", LEVELS[level]),
        config or CurationConfig(),
    )


def test_values_by_hand() -> None:
    # a against b: m = 1, c = 1; a against c: m = 0.5, c = 0.5; b against c: m = -0.4, c = 1.
    half = {
        ("a", "b"): FoldedPair(1, 1),
        ("a", "c"): FoldedPair(0.5, 0.5),
        ("b", "c"): FoldedPair(-0.4, 1),
    }
    folded = half | {
        (second, first): FoldedPair(-pair.margin, pair.certainty)
        for (first, second), pair in half.items()
    }
    # v_a = (1 + 0.25) / 2, v_b = (-1 - 0.4) / 2, v_c = (-0.25 + 0.4) / 2.
    assert values(["a", "b", "c"], folded) == pytest.approx({"a": 0.625, "b": -0.7, "c": 0.075})


def test_a_sure_pair_gives_its_winner_with_full_margin() -> None:
    result = curate_one(WRONG, RIGHT, level=1)
    (preference,) = result.preferences
    # The only pair has m = 1 and certainty 1.
    assert (preference.chosen.id, preference.rejected.id) == ("b", "a")
    assert (preference.margin, preference.confidence, preference.anchor) == (1, 1, None)
    assert sum(result.reasons.values()) == 0
    # b has 9 tokens and a has 10.
    assert result.figures.length_difference == -1
    assert result.figures.swap_consistency == 1


def test_two_candidates_of_which_nobody_is_sure_give_no_preference() -> None:
    # Mean 4, so m = 0.5 in both orders; variance 0.25 * 9 + 0.75 * 1 = 3 > 2, so c = 0 and v = 0.
    unsure = (0.25, 0.0, 0.0, 0.0, 0.75)
    result = curate(
        {"s": sample()},
        [candidates("s", RIGHT, WRONG)],
        both_orders("s", "a", "b", unsure),
        CurationConfig(),
    )
    assert result.preferences == ()
    assert result.reasons[Reason.SMALL_MARGIN] == 1
    assert result.figures.margins == (0,)
    assert result.figures.confidences == (0,)


def test_confidence_is_the_mean_over_the_pairs_of_chosen_or_rejected() -> None:
    # Four candidates; a beats all, d loses to all. All pairs are sure but (b, c), which contains
    # neither, and (a, d), which is uniform: confidence (1 + 1 + 0 + 1 + 1) / 5 = 0.8.
    sure = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")]
    ratings = [each for pair in sure for each in both_orders("s", *pair, LEVELS[5])]
    ratings += both_orders("s", "a", "d", UNIFORM) + both_orders("s", "b", "c", UNIFORM)
    texts = [RIGHT, RIGHT + " ", WRONG, WRONG + " "]
    (preference,) = curate(
        {"s": sample()}, [candidates("s", *texts)], ratings, CurationConfig(min_margin=0)
    ).preferences
    # v_a = (1 + 1 + 0) / 3, v_d = -2/3.
    assert (preference.chosen.id, preference.rejected.id) == ("a", "d")
    assert preference.confidence == pytest.approx(0.8)
    # The verdict on the two themselves is uniform: their margin says nothing about the others.
    assert preference.margin == 0


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_margin_means_the_same_for_any_number_of_candidates(count: int) -> None:
    # a, c, d and e are equal, and b is worse than a by m = 1/2, surely, and equal to the others:
    # v_a - v_b = 2 * (1/2) / (N - 1), but the margin is the verdict on a against b.
    names = "abcde"[:count]
    texts = [RIGHT, WRONG, *[f"Perhaps {name}.\nAnswer: 3" for name in names[2:]]]
    ratings = [
        each
        for first, second in itertools.combinations(names, 2)
        for each in both_orders(
            "s", first, second, LEVELS[4 if (first, second) == ("a", "b") else 3]
        )
    ]
    result = curate({"s": sample()}, [candidates("s", *texts)], ratings, CurationConfig())
    assert result.figures.margins == (0.5,)


@pytest.mark.parametrize(
    ("texts", "level", "gate", "reason"),
    [
        ([RIGHT], 5, "chosen", Reason.TOO_FEW_CANDIDATES),
        ([RIGHT, RIGHT.replace(" ", "  ")], 5, "chosen", Reason.EQUAL_TEXTS),
        ([RIGHT, WRONG], 3, "chosen", Reason.SMALL_MARGIN),
        ([WRONG, RIGHT], 5, "chosen", Reason.CHOSEN_ANSWER_WRONG),
        (["It is 3.", RIGHT], 5, "chosen", Reason.CHOSEN_ANSWER_WRONG),
        (["Yes.\nAnswer: 3", RIGHT], 5, "strict", Reason.REJECTED_ANSWER_RIGHT),
        (["Yes.\nAnswer: 3", RIGHT], 5, "chosen", None),
        ([RIGHT, WRONG], 5, "strict", None),
        ([WRONG, RIGHT], 5, "off", None),
    ],
)
def test_every_sample_gives_a_preference_or_is_counted_under_its_reason(
    texts: list[str], level: int, gate: str, reason: Reason | None
) -> None:
    config = CurationConfig.model_validate({"answer_gate": gate})
    result = curate(
        {"s": sample()},
        [candidates("s", *texts)],
        both_orders("s", "a", "b", LEVELS[level]) if len(texts) > 1 else [],
        config,
    )
    assert {name for name, count in result.reasons.items() if count} == ({reason} - {None})
    assert len(result.preferences) == (reason is None)
    assert set(result.reasons) == set(Reason)


@pytest.mark.parametrize(
    ("rejected", "least", "expected"),
    [("worst", 0.2, "d"), ("likeliest", 0.2, "c"), ("likeliest", 0.8, "d"), ("likeliest", 0, "b")],
)
def test_the_rejected_response_is_the_worst_or_the_likeliest_that_is_worse(
    rejected: str, least: float, expected: str
) -> None:
    # a is best. Against it b is equal (0), c worse (0.5), d much worse (1). b is the likeliest,
    # then c, then d, whatever its length.
    texts = [RIGHT, "So.\nAnswer: 3", "No.\nAnswer: 4", WRONG]
    found = candidates("s", *texts)
    likely = tuple(
        each.model_copy(update={"log_probability": score})
        for each, score in zip(found.candidates, (-3, -1, -2, -9), strict=True)
    )
    levels = {("a", "b"): 3, ("a", "c"): 4, ("a", "d"): 5, ("b", "c"): 3}
    ratings = [
        each
        for pair in itertools.combinations("abcd", 2)
        for each in both_orders("s", *pair, LEVELS[levels.get(pair, 4)])
    ]
    config = CurationConfig.model_validate({"rejected": rejected, "min_margin": least})
    found = found.model_copy(update={"candidates": likely})
    (preference,) = curate({"s": sample()}, [found], ratings, config).preferences
    assert (preference.chosen.id, preference.rejected.id) == ("a", expected)


def anchored(chosen: Five, rejected: Five = LEVELS[1]) -> list[Rating]:
    """Candidate a is better than b, surely; each is rated against the reference, too."""
    return [
        *both_orders("s", "a", "b", LEVELS[5]),
        *both_orders("s", "a", REFERENCE, chosen),
        *both_orders("s", "b", REFERENCE, rejected),
    ]


@pytest.mark.parametrize(
    ("chosen", "tolerance", "anchor", "is_kept"),
    [
        (LEVELS[3], 0.2, 0, True),
        (LEVELS[4], 0.2, 0.5, True),
        # Somewhat worse: m = -1/2, sure.
        (LEVELS[2], 0.2, -0.5, False),
        (LEVELS[2], 0.5, -0.5, True),
        (LEVELS[1], 1, -1, True),
        # Nobody is sure: c = 0, so it is not clearly worse.
        (UNIFORM, 0, 0, True),
    ],
)
def test_a_chosen_response_that_is_clearly_worse_than_the_reference_is_dropped(
    chosen: Five, tolerance: float, anchor: float, is_kept: bool
) -> None:
    config = CurationConfig(anchor_tolerance=tolerance)
    found = [candidates("s", RIGHT, WRONG)]
    result = curate({"s": sample()}, found, anchored(chosen), config)
    assert [each.anchor for each in result.preferences] == [anchor] * is_kept
    assert result.reasons[Reason.WORSE_THAN_REFERENCE] == (not is_kept)
    assert result.figures.anchors == (anchor,)
    assert result.figures.unanchored == 0
    # The reference is no candidate: neither values nor confidence see it.
    assert result.figures.margins == result.figures.confidences == (1,)


def test_without_a_reference_nothing_is_compared_with_it() -> None:
    result = curate_one(RIGHT, WRONG, config=CurationConfig(anchor_tolerance=0))
    assert (result.figures.preferences, result.figures.unanchored) == (1, 1)
    assert result.figures.anchors == ()


def test_a_sample_that_was_not_rated_for_want_of_a_reference_is_counted() -> None:
    sets = [candidates("s", RIGHT, WRONG)]
    result = curate({"s": sample()}, sets, [], CurationConfig(), unrated={"s"})
    assert result.reasons[Reason.NO_REFERENCE] == 1
    assert (result.preferences, result.figures.margins) == ((), ())


def test_with_no_least_margin_a_full_tie_still_has_two_ends() -> None:
    result = curate_one(RIGHT, WRONG, level=3, config=CurationConfig(min_margin=0))
    (preference,) = result.preferences
    assert (preference.chosen.id, preference.rejected.id) == ("a", "b")


def test_keep_fraction_keeps_the_strongest_of_every_category() -> None:
    # Four perception, two chart, two math; half of each is kept, the surer half.
    categories = [Category.PERCEPTION] * 4 + [Category.CHART] * 2 + [Category.MATH] * 2
    samples = {str(number): sample(str(number), kind) for number, kind in enumerate(categories)}
    ratings = [
        rating
        for name in samples
        for rating in both_orders(name, "a", "b", LEVELS[5 if int(name) % 2 else 4])
    ]
    sets = [candidates(name, RIGHT, WRONG) for name in samples]
    result = curate(samples, sets, ratings, CurationConfig(keep_fraction=0.5))
    assert [each.sample_id for each in result.preferences] == ["1", "3", "5", "7"]
    assert result.reasons[Reason.NOT_KEPT] == 4
    assert result.figures.by_category == {
        Category.PERCEPTION: 2, Category.CHART: 1, Category.MATH: 1,
    }  # fmt: skip
    assert (result.figures.samples, result.figures.preferences) == (8, 4)
    assert len(result.figures.margins) == 8
    assert result.figures.mean_margin == 1


def test_a_tenth_of_thirty_is_three() -> None:
    samples = {f"{number:02}": sample(f"{number:02}") for number in range(30)}
    ratings = [each for name in samples for each in both_orders(name, "a", "b", LEVELS[5])]
    sets = [candidates(name, RIGHT, WRONG) for name in samples]
    result = curate(samples, sets, ratings, CurationConfig(keep_fraction=0.1))
    assert [each.sample_id for each in result.preferences] == ["00", "01", "02"]


def test_ratings_that_do_not_fit_the_candidates_are_refused() -> None:
    sets = [candidates("s", RIGHT, WRONG)]
    good = both_orders("s", "a", "b", LEVELS[5])
    with pytest.raises(UserError, match="sample s do not cover"):
        curate({"s": sample()}, sets, [], CurationConfig())
    with pytest.raises(UserError, match="sample s do not cover"):
        stranger = both_orders("s", "a", "z", LEVELS[5])
        curate({"s": sample()}, sets, good + stranger, CurationConfig())
    with pytest.raises(UserError, match="sample s do not cover"):
        half_anchored = both_orders("s", "a", REFERENCE, LEVELS[3])
        curate({"s": sample()}, sets, good + half_anchored, CurationConfig())
    with pytest.raises(UserError, match="refer to sample s, which is not in the data set"):
        curate({}, sets, good, CurationConfig())


def five(weights: Sequence[float]) -> Five:
    one, two, three, four, last = (weight / math.fsum(weights) for weight in weights)
    return one, two, three, four, last


DISTRIBUTIONS = (
    st.lists(st.floats(0, 1), min_size=5, max_size=5).filter(lambda w: sum(w) > 1e-3).map(five)
)


@st.composite
def rated_sets(draw: st.DrawFn) -> tuple[CandidateSet, list[Rating]]:
    count = draw(st.integers(2, 5))
    found = candidates("s", *[f"Text {number}.\nAnswer: 3" for number in range(count)])
    ids = [each.id for each in found.candidates]
    ratings = [
        Rating(sample_id="s", first=left, second=right, probabilities=draw(DISTRIBUTIONS), mass=1)
        for left in ids
        for right in ids
        if left != right
    ]
    return found, ratings


LOOSE = CurationConfig(min_margin=0)


@given(rated_sets(), st.randoms())
def test_the_order_of_candidates_and_ratings_changes_nothing(
    rated: tuple[CandidateSet, list[Rating]], rng: random.Random
) -> None:
    found, ratings = rated
    reordered = found.model_copy(
        update={"candidates": tuple(rng.sample(found.candidates, len(found.candidates)))}
    )
    before = curate({"s": sample()}, [found], ratings, LOOSE)
    after = curate({"s": sample()}, [reordered], rng.sample(ratings, len(ratings)), LOOSE)
    assert after == before


@given(rated_sets(), st.randoms())
def test_relabelling_the_candidates_changes_no_text(
    rated: tuple[CandidateSet, list[Rating]], rng: random.Random
) -> None:
    found, ratings = rated
    ids = [each.id for each in found.candidates]
    names = dict(zip(ids, rng.sample(ids, len(ids)), strict=True))
    relabelled = found.model_copy(
        update={
            "candidates": tuple(
                each.model_copy(update={"id": names[each.id]}) for each in found.candidates
            )
        }
    )
    renamed = [
        each.model_copy(update={"first": names[each.first], "second": names[each.second]})
        for each in ratings
    ]
    # Exact ties are broken by id, so they may go the other way.
    value = list(values(ids, fold_ratings(ratings)).values())
    assume(value.count(max(value)) == value.count(min(value)) == 1)
    before = curate({"s": sample()}, [found], ratings, LOOSE)
    after = curate({"s": sample()}, [relabelled], renamed, LOOSE)
    assert after.figures == before.figures
    for then, now in zip(before.preferences, after.preferences, strict=True):
        assert (now.chosen.text, now.rejected.text) == (then.chosen.text, then.rejected.text)


@given(rated_sets())
def test_swapping_the_order_of_all_pairs_changes_nothing(
    rated: tuple[CandidateSet, list[Rating]],
) -> None:
    found, ratings = rated
    swapped = [
        each.model_copy(
            update={
                "first": each.second,
                "second": each.first,
                "probabilities": each.probabilities[::-1],
            }
        )
        for each in ratings
    ]
    before = curate({"s": sample()}, [found], ratings, LOOSE)
    after = curate({"s": sample()}, [found], swapped, LOOSE)
    assert after == before
