import io
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from srccore.data.records import Category, Fact, Judgement, Response, Sample
from srccore.errors import UserError
from srccore.method.evaluation import (
    FIGURE_NAMES,
    SHOWN,
    Figures,
    FigureSet,
    Outcome,
    figures,
    judge_responses,
    paired_change,
)
from srccore.run.console import figures_table

FACTS = (
    Fact(subject="the left digit", relation="is", value="3"),
    Fact(subject="the right digit", relation="is", value="4"),
    Fact(subject="3 plus 4", relation="is", value="7", visual=False),
)
GOLD = "The left digit is 3. The right digit is 4. 3 plus 4 is 7."
FLAWED = "The left digit is 3. The right digit is 5. 3 plus 5 is 8."


def outcome(
    sample_id: str,
    answer_right: bool,
    rationale_right: bool | None,
    consistent: bool | None = True,
    category: Category = Category.MATH,
    tokens: int = 10,
) -> Outcome:
    return Outcome(sample_id, category, True, answer_right, rationale_right, consistent, tokens)


def sum_up(outcomes: list[Outcome], previous: list[Outcome] | None = None) -> Figures:
    return figures(outcomes, round=1, previous=previous, resamples=200, seed=0)


@pytest.mark.parametrize(
    ("text", "parsed", "answer", "rationale", "consistent"),
    [
        (f"{GOLD}\nAnswer: 7", True, True, True, True),
        (f"{GOLD}\nAnswer: 8", True, False, True, False),
        (f"{FLAWED}\nAnswer: 7", True, True, False, False),
        (f"{FLAWED}\nAnswer: 8", True, False, False, True),
        ("Answer: 7", True, True, False, False),
        (GOLD, False, False, False, False),
    ],
)
def test_a_response_is_judged_on_answer_rationale_and_consistency(
    text: str, parsed: bool, answer: bool, rationale: bool, consistent: bool
) -> None:
    sample = Sample(id="s", category=Category.MATH, question="Sum?", answer="7", facts=FACTS)
    response = Response(sample_id="s", text=text, token_count=5, finished=True)
    assert judge_responses([sample], {"s": response}) == [
        Outcome("s", Category.MATH, parsed, answer, rationale, consistent, 5)
    ]


def test_a_response_that_was_cut_does_not_parse() -> None:
    sample = Sample(id="s", category=Category.MATH, question="Sum?", answer="7", facts=FACTS)
    # It may have been about to write 75.
    response = Response(sample_id="s", text=f"{GOLD}\nAnswer: 7", token_count=5, finished=False)
    assert judge_responses([sample], {"s": response}) == [
        Outcome("s", Category.MATH, False, False, False, False, 5)
    ]


@pytest.mark.parametrize(
    ("right", "derived", "rationale", "consistent"),
    [(True, "7", True, True), (False, "8", False, False), (False, "", False, False)],
)
def test_without_facts_a_judgement_decides(
    right: bool, derived: str, rationale: bool, consistent: bool
) -> None:
    sample = Sample(id="s", category=Category.CHART, question="Sum?", answer="7")
    response = Response(sample_id="s", text="So.\nAnswer: 7", token_count=5, finished=True)
    verdict = Judgement(sample_id="s", rationale_right=right, derived_answer=derived)
    (found,) = judge_responses([sample], {"s": response}, {"s": verdict})
    assert (found.rationale_right, found.consistent) == (rationale, consistent)
    assert sum_up([found]).judged == 1


def test_facts_are_checked_by_program_whatever_a_judge_says() -> None:
    sample = Sample(id="s", category=Category.MATH, question="Sum?", answer="7", facts=FACTS)
    response = Response(sample_id="s", text=f"{FLAWED}\nAnswer: 7", token_count=5, finished=True)
    verdict = Judgement(sample_id="s", rationale_right=True, derived_answer="7")
    (found,) = judge_responses([sample], {"s": response}, {"s": verdict})
    assert (found.rationale_right, found.consistent) == (False, False)


def test_without_facts_the_rationale_gets_no_verdict_and_its_figures_are_null() -> None:
    sample = Sample(id="s", category=Category.CHART, question="Sum?", answer="7")
    response = Response(sample_id="s", text="So.\nAnswer: 7", token_count=5, finished=True)
    (found,) = judge_responses([sample], {"s": response})
    assert (found.answer_right, found.rationale_right, found.consistent) == (True, None, None)
    summed = sum_up([found])
    assert (summed.n, summed.judged, summed.accuracy) == (1, 0, 1)
    assert summed.rationale_accuracy is None
    assert summed.aligned_accuracy is None
    assert summed.spurious_correctness is None
    assert summed.consistency is None
    assert set(summed.interval) == {"accuracy", "format_rate", "mean_tokens"}


def test_responses_to_other_samples_are_refused() -> None:
    sample = Sample(id="s", category=Category.MATH, question="Sum?", answer="7")
    response = Response(sample_id="t", text="x", token_count=1, finished=True)
    with pytest.raises(UserError, match="s has no response"):
        judge_responses([sample], {})
    with pytest.raises(UserError, match="t has a response but is not in the split"):
        judge_responses([], {"t": response})


# Five samples: right and sound, right and unsound twice, wrong and sound, wrong and unsound.
FIVE = [
    outcome("a", True, True, tokens=10),
    outcome("b", True, False, False, tokens=20),
    outcome("c", True, False, False, Category.CHART, tokens=30),
    outcome("d", False, True, False, Category.CHART, tokens=40),
    outcome("e", False, False, tokens=50),
]


def test_the_figures_by_hand() -> None:
    summed = sum_up(FIVE)
    assert summed.round == 1
    assert (summed.n, summed.judged) == (5, 5)
    assert summed.accuracy == pytest.approx(3 / 5)
    assert summed.rationale_accuracy == pytest.approx(2 / 5)
    assert summed.aligned_accuracy == pytest.approx(1 / 5)
    assert summed.spurious_correctness == pytest.approx(2 / 3)  # 2 of the 3 right answers
    assert summed.consistency == pytest.approx(2 / 5)
    assert summed.format_rate == 1
    assert summed.mean_tokens == 30
    assert summed.change is None
    assert set(summed.by_category) == {Category.MATH, Category.CHART}
    chart = summed.by_category[Category.CHART]
    assert (chart.n, chart.accuracy, chart.spurious_correctness) == (2, 0.5, 1)


def test_figures_are_written_in_the_order_in_which_they_are_declared() -> None:
    assert tuple(sum_up(FIVE).interval) == FIGURE_NAMES
    assert tuple(FigureSet.model_fields) == ("n", "judged", *FIGURE_NAMES, "interval")


def test_the_table_of_a_run_has_a_column_for_every_figure() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(figures_table([sum_up(FIVE).model_dump(mode="json")]))
    _, header, _, row = [line for line in console.file.getvalue().splitlines() if line.strip()]
    assert header.split() == ["after", *(figure.short for figure in SHOWN)]
    assert header.split()[1] == "aligned"
    assert row.startswith(" round 1  20.0 ±")
    assert row.split()[-1] == "30.0"


def test_spurious_correctness_is_null_where_no_answer_is_right() -> None:
    summed = sum_up([outcome("a", False, True), outcome("b", False, False)])
    assert summed.spurious_correctness is None
    assert "spurious_correctness" not in summed.interval


def test_the_figures_survive_their_json_form() -> None:
    summed = sum_up(FIVE, FIVE)
    assert Figures.model_validate_json(summed.model_dump_json()) == summed


def test_a_change_is_after_minus_before_on_the_same_samples() -> None:
    after = [outcome(each.sample_id, True, True, category=each.category) for each in FIVE]
    change = paired_change(FIVE, after, resamples=500, seed=1)
    assert change["aligned_accuracy"].difference == pytest.approx(4 / 5)
    assert change["spurious_correctness"].difference == pytest.approx(-2 / 3)
    assert change["mean_tokens"].difference == -20
    low, high = change["aligned_accuracy"].interval
    # 4 of 5 samples gain: binomial(5, 0.8) / 5, whose 2.5 % quantile is 2 / 5 (P(X <= 1) = 0.007,
    # P(X <= 2) = 0.058) and whose 97.5 % quantile is 1 (P(X = 5) = 0.33).
    assert (low, high) == pytest.approx((0.4, 1.0))
    assert sum_up(after, FIVE).change is not None


def test_a_figure_that_one_side_lacks_has_no_change() -> None:
    before = [outcome("a", False, False)]
    change = paired_change(before, [outcome("a", True, True)], resamples=100, seed=0)
    assert set(change) == set(FIGURE_NAMES) - {"spurious_correctness"}


def test_evaluations_of_other_samples_are_not_compared() -> None:
    with pytest.raises(UserError, match="different samples"):
        paired_change(FIVE, FIVE[1:], resamples=100, seed=0)
    with pytest.raises(UserError, match="no responses"):
        sum_up([])


def test_the_interval_of_a_fair_coin_is_the_binomial_one() -> None:
    # Of 100 samples half are right: sd of the mean 0.05, so about 0.5 -+ 1.96 * 0.05.
    outcomes = [outcome(f"{number:03}", number % 2 == 0, True) for number in range(100)]
    summed = figures(outcomes, round=0, previous=None, resamples=4000, seed=0)
    assert summed.interval["accuracy"] == pytest.approx((0.402, 0.598), abs=0.02)


@st.composite
def evaluated(draw: st.DrawFn) -> list[Outcome]:
    count = draw(st.integers(1, 12))
    found = []
    for number in range(count):
        judged = draw(st.booleans())
        found.append(
            Outcome(
                sample_id=f"{number:02}",
                category=draw(st.sampled_from(Category)),
                parsed=draw(st.booleans()),
                answer_right=draw(st.booleans()),
                rationale_right=draw(st.booleans()) if judged else None,
                consistent=draw(st.booleans()) if judged else None,
                token_count=draw(st.integers(0, 50)),
            )
        )
    return found


@settings(max_examples=50, deadline=None)
@given(evaluated())
def test_intervals_contain_the_point_estimate(outcomes: list[Outcome]) -> None:
    summed = sum_up(outcomes)
    for group in (summed, *summed.by_category.values()):
        for name, (low, high) in group.interval.items():
            assert low <= getattr(group, name) <= high


@settings(max_examples=50, deadline=None)
@given(evaluated(), st.integers(0, 2**32), st.randoms())
def test_identical_outcomes_change_by_nothing_in_any_order(
    outcomes: list[Outcome], seed: int, rng: random.Random
) -> None:
    reordered = rng.sample(outcomes, len(outcomes))
    for change in paired_change(outcomes, reordered, resamples=100, seed=seed).values():
        assert (change.difference, change.interval) == (0, (0, 0))
    assert sum_up(reordered) == sum_up(outcomes)


@settings(max_examples=50, deadline=None)
@given(evaluated())
def test_aligned_accuracy_is_accuracy_times_one_minus_spurious(outcomes: list[Outcome]) -> None:
    judged = [each for each in outcomes if each.rationale_right is not None]
    if any(each.answer_right for each in judged):
        summed = sum_up(judged)
        assert summed.aligned_accuracy is not None
        assert summed.spurious_correctness is not None
        expected = summed.accuracy * (1 - summed.spurious_correctness)
        assert summed.aligned_accuracy == pytest.approx(expected)


def test_two_policies_are_compared_on_the_samples_that_are_judged_for_both() -> None:
    # The judge failed on b before and on c after: only a is judged for both, right both times. Over
    # the samples of each policy on its own, 1/2 would have become 2/2.
    before = [outcome("a", True, True), outcome("b", True, None, None), outcome("c", True, False)]
    after = [outcome("a", True, True), outcome("b", False, True), outcome("c", True, None, None)]
    change = paired_change(before, after, 200, 0)
    assert change["aligned_accuracy"].difference == 0
    assert change["rationale_accuracy"].interval == (0, 0)
    # The answers are compared on all three: 3/3 to 2/3.
    assert change["accuracy"].difference == pytest.approx(-1 / 3)


def test_figures_that_no_common_sample_is_judged_for_do_not_change() -> None:
    before = [outcome("a", True, True), outcome("b", True, None, None)]
    after = [outcome("a", True, None, None), outcome("b", True, True)]
    assert set(paired_change(before, after, 200, 0)) == {"accuracy", "format_rate", "mean_tokens"}
