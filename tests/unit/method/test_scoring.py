import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srccore.data.records import Candidate, CandidateSet, Category, Fact, Rating, Sample
from srccore.errors import UserError
from srccore.method import scoring
from srccore.method.engine import TokenDistribution

SURE_BETTER = (0.0, 0.0, 0.0, 0.0, 1.0)
SURE_WORSE = (1.0, 0.0, 0.0, 0.0, 0.0)
SURE_EQUAL = (0.0, 0.0, 1.0, 0.0, 0.0)
UNIFORM = (0.2, 0.2, 0.2, 0.2, 0.2)
Five = tuple[float, float, float, float, float]


def five(weights: Sequence[float]) -> Five:
    one, two, three, four, last = (weight / math.fsum(weights) for weight in weights)
    return one, two, three, four, last


DISTRIBUTIONS = (
    st.lists(st.floats(0, 1), min_size=5, max_size=5).filter(lambda w: sum(w) > 1e-3).map(five)
)


def rating(first: str, second: str, probabilities: Five, sample_id: str = "s") -> Rating:
    return Rating(
        sample_id=sample_id, first=first, second=second, probabilities=probabilities, mass=0.5
    )


def candidate(name: str, text: str = "text") -> Candidate:
    return Candidate(id=name, text=text, log_probability=-1.0, token_count=1)


class LengthEngine:
    """Prefers the longer response with certainty."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[str]]] = []

    def next_token_distribution(
        self, prompts: Sequence[str], tokens: Sequence[str]
    ) -> list[TokenDistribution]:
        self.calls.append((list(prompts), list(tokens)))
        found = []
        for prompt in prompts:
            first, second = prompt.split("\n")[3:]
            is_longer = len(first.removeprefix("First: ")) > len(second.removeprefix("Second: "))
            found.append(TokenDistribution(SURE_BETTER if is_longer else SURE_WORSE, 0.9))
        return found


FACTS = (
    Fact(subject="the bar", relation="is", value="3"),
    Fact(subject="the line", relation="is", value="4", needed=False),
)
SAMPLE = Sample(id="s", category=Category.CHART, question="How high?", answer="3", facts=FACTS)


def test_the_prompt_has_five_labelled_lines() -> None:
    sample = SAMPLE.model_copy(update={"rationale": "The bar\nis 3."})
    assert scoring.rating_prompt(sample, "It is 3.\nAnswer: 3", "No.\nAnswer: 4") == (
        "Question: How high?\nReference: 3\nFacts: The bar is 3.\n"
        "First: It is 3. Answer: 3\nSecond: No. Answer: 4"
    )


def test_the_prompt_falls_back_to_the_needed_facts() -> None:
    assert "\nFacts: The bar is 3.\n" in scoring.rating_prompt(SAMPLE, "a", "b")
    bare = SAMPLE.model_copy(update={"facts": ()})
    assert "\nFacts: none\n" in scoring.rating_prompt(bare, "a", "b")


BARE = SAMPLE.model_copy(update={"facts": ()})


def test_the_schedule_holds_all_ordered_pairs_and_the_reference_as_an_anchor() -> None:
    def ids(sample: Sample, names: str) -> list[tuple[str, str]]:
        pairs = scoring.pair_schedule(sample, [candidate(name) for name in names])
        return [(left.id, right.id) for left, right in pairs]

    of_three = [("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "b")]
    assert ids(BARE, "abc") == of_three
    assert ids(SAMPLE, "abc") == [
        *of_three,
        ("a", "reference"), ("reference", "a"),
        ("b", "reference"), ("reference", "b"),
        ("c", "reference"), ("reference", "c"),
    ]  # fmt: skip
    assert ids(SAMPLE, "a") == []
    assert len(ids(BARE, "abcdefgh")) == 56
    assert len(ids(SAMPLE, "abcdefgh")) == 56 + 16
    with pytest.raises(UserError, match="9 candidates"):
        ids(SAMPLE, "abcdefghi")


def test_the_reference_response_gives_the_rationale_of_the_sample_or_else_its_facts() -> None:
    own = SAMPLE.model_copy(update={"rationale": "I see it."})
    assert scoring.reference_response(own) == "I see it.\nAnswer: 3"
    assert scoring.reference_response(SAMPLE) == "The bar is 3.\nAnswer: 3"
    assert scoring.reference_response(BARE) is None
    _, (_, text) = scoring.pair_schedule(own, [candidate("a"), candidate("b")])[1:3]
    assert text.text == "I see it.\nAnswer: 3"


def test_all_pairs_of_all_samples_are_rated_in_one_call() -> None:
    engine = LengthEngine()
    other = SAMPLE.model_copy(update={"id": "t"})
    sets = [
        (
            SAMPLE,
            CandidateSet(sample_id="s", candidates=(candidate("a", "x"), candidate("b", "xx"))),
        ),
        (other, CandidateSet(sample_id="t", candidates=(candidate("c"),))),
    ]
    ratings = scoring.rate_candidates(engine, sets)
    # The reference, "The bar is 3. Answer: 3", is longer than both.
    assert [(each.first, each.second, each.probabilities) for each in ratings] == [
        ("a", "b", SURE_WORSE),
        ("b", "a", SURE_BETTER),
        ("a", "reference", SURE_WORSE),
        ("reference", "a", SURE_BETTER),
        ("b", "reference", SURE_WORSE),
        ("reference", "b", SURE_BETTER),
    ]
    assert [tokens for _, tokens in engine.calls] == [["1", "2", "3", "4", "5"]]
    assert scoring.mean_mass(ratings) == pytest.approx(0.9)
    assert scoring.rate_candidates(engine, sets[1:]) == []
    assert len(engine.calls) == 1


@pytest.mark.parametrize(
    ("probabilities", "preference", "certainty"),
    [
        (SURE_BETTER, 1, 1),  # (5 - 3) / 2; sd 0
        (SURE_WORSE, -1, 1),
        (SURE_EQUAL, 0, 1),
        (UNIFORM, 0, 0),  # variance (4 + 1 + 0 + 1 + 4) / 5 = 2, sd = sqrt 2
        ((0.5, 0, 0, 0, 0.5), 0, 0),  # variance 4: wider than uniform, held at 0
        # Mean 4.5, variance 1/4, sd 1/2: c = 1 - 0.5 / sqrt 2.
        ((0, 0, 0, 0.5, 0.5), 0.75, 1 - 0.5 / math.sqrt(2)),
        # Mean 4, variance (1 + 0 + 1) / 2 = 1: c = 1 - 1 / sqrt 2.
        ((0, 0, 0.5, 0, 0.5), 0.5, 1 - 1 / math.sqrt(2)),
    ],
)
def test_preference_and_certainty_by_hand(
    probabilities: Five, preference: float, certainty: float
) -> None:
    assert scoring.preference_of(probabilities) == pytest.approx(preference)
    assert scoring.certainty_of(probabilities) == pytest.approx(certainty)


def test_folding_by_hand() -> None:
    # m_ij = 1, m_ji = -1: the orders agree. m = (1 + 1) / 2 = 1, c = 1 * (1 - 0) = 1.
    agreed = scoring.fold(rating("a", "b", SURE_BETTER), rating("b", "a", SURE_WORSE))
    assert (agreed.margin, agreed.certainty) == (1, 1)
    # m_ij = m_ji = 1: always the first. m = 0, c = 1 * (1 - 2 / 2) = 0.
    flipped = scoring.fold(rating("a", "b", SURE_BETTER), rating("b", "a", SURE_BETTER))
    assert (flipped.margin, flipped.certainty) == (0, 0)
    # m_ij = 1, m_ji = 0, c = 1 and 0: m = 1/2, c = (1 + 0) / 2 * (1 - 1/2) = 1/4.
    half = scoring.fold(rating("a", "b", SURE_BETTER), rating("b", "a", UNIFORM))
    assert (half.margin, half.certainty) == pytest.approx((0.5, 0.25))
    assert half.weighted == pytest.approx(0.125)


@given(DISTRIBUTIONS, DISTRIBUTIONS)
def test_folded_verdicts_are_bounded_and_antisymmetric(there: Five, back: Five) -> None:
    folded = scoring.fold_ratings([rating("a", "b", there), rating("b", "a", back)])
    pair, mirrored = folded["a", "b"], folded["b", "a"]
    assert pair.margin == -mirrored.margin
    assert pair.certainty == mirrored.certainty
    assert -1 - 1e-9 <= pair.margin <= 1 + 1e-9
    assert 0 <= pair.certainty <= 1


@given(DISTRIBUTIONS)
def test_a_mirrored_rating_negates_the_preference_exactly(probabilities: Five) -> None:
    mirrored = probabilities[::-1]
    assert scoring.preference_of(mirrored) == -scoring.preference_of(probabilities)
    assert scoring.certainty_of(mirrored) == scoring.certainty_of(probabilities)
    assert scoring.verdict(mirrored) == -scoring.verdict(probabilities)


@given(DISTRIBUTIONS, DISTRIBUTIONS, st.floats(0, 1))
def test_at_equal_verdicts_a_certain_rating_never_counts_less(
    certain: Five, back: Five, share: float
) -> None:
    # Half of some mass on 3 goes to 2 and half to 4: same mean, wider.
    moved = share * certain[2] / 2
    one, two, three, four, last = certain
    uncertain = (one, two + moved, three - 2 * moved, four + moved, last)
    sure = scoring.fold(rating("a", "b", certain), rating("b", "a", back))
    unsure = scoring.fold(rating("a", "b", uncertain), rating("b", "a", back))
    assert sure.margin == pytest.approx(unsure.margin)
    assert abs(sure.certainty * sure.margin) >= abs(unsure.certainty * unsure.margin) - 1e-9


def test_a_missing_or_repeated_order_is_told() -> None:
    with pytest.raises(UserError, match="Sample s has no rating of b against a"):
        scoring.fold_ratings([rating("a", "b", UNIFORM)])
    with pytest.raises(UserError, match="Sample s has two ratings of a against b"):
        scoring.fold_ratings([rating("a", "b", UNIFORM), rating("a", "b", UNIFORM)])


def test_the_three_way_verdict_takes_the_likeliest_side() -> None:
    assert scoring.verdict((0.1, 0.1, 0.35, 0.25, 0.2)) == 1  # 0.2, 0.35, 0.45
    assert scoring.verdict((0.25, 0.2, 0.35, 0.1, 0.1)) == -1
    assert scoring.verdict((0.15, 0.15, 0.4, 0.15, 0.15)) == 0
    assert scoring.verdict(UNIFORM) == 0  # 0.4 against 0.4: a tie


def test_swap_consistency_counts_unordered_pairs() -> None:
    ratings = [
        rating("a", "b", SURE_BETTER), rating("b", "a", SURE_WORSE),  # agree
        rating("a", "c", SURE_BETTER), rating("c", "a", SURE_EQUAL),  # do not
        rating("b", "c", SURE_EQUAL), rating("c", "b", SURE_EQUAL),  # agree
        rating("b", "a", SURE_BETTER, "t"), rating("a", "b", SURE_BETTER, "t"),  # do not
        rating("a", "b", SURE_BETTER, "u"),  # one order only: not counted
    ]  # fmt: skip
    assert scoring.swap_consistency(ratings) == 0.5
    assert scoring.swap_consistency(ratings[-1:]) is None
    assert scoring.mean_mass([]) is None
