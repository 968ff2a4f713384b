import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from srccore.method.response import ParsedResponse, normalise_answer, parse, same_answer, write

ANSWERS = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(["the", "a", " ", "'", '"', ".", ",", "1,000", ".50", "two", "-0", "("])
    ).map("".join),
)


@given(st.text(), st.text())
def test_what_was_written_is_parsed_again(rationale: str, answer: str) -> None:
    assume(answer.strip() and "\n" not in answer.strip())
    assume(all(not line.strip().casefold().startswith("an") for line in rationale.split("\n")))
    assert parse(write(rationale, answer)) == ParsedResponse(rationale.strip(), answer.strip())


def test_a_response_needs_one_answer_line_and_it_is_the_last() -> None:
    assert parse("The bar is 3.\nAnswer: 3") == ParsedResponse("The bar is 3.", "3")
    assert parse("Answer: 3") == ParsedResponse("", "3")
    assert parse(" the bar\nanswer : 3 \n") == ParsedResponse("the bar", "3")
    assert parse("Answer: 3\nThe bar is 3.") is None
    assert parse("Answer: 3\nAnswer: 3") is None
    assert parse("The bar is 3.") is None
    assert parse("The bar is 3.\nAnswer: ") is None
    assert parse("") is None


@given(ANSWERS)
def test_normalising_twice_changes_nothing(answer: str) -> None:
    once = normalise_answer(answer)
    assert normalise_answer(once) == once


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The  Cat.", "cat"),
        ("the 'cat'", "cat"),
        ("A", "a"),
        ("1,000.0", "1000"),
        ("two", "2"),
        ("The two", "2"),
        (".5", "0.5"),
        ("-.50", "-0.5"),
        ("0.50.", "0.5"),
        ("-0", "0"),
        ("007", "7"),
        ("(B)", "b"),
        ("...", ""),
    ],
)
def test_answers_have_one_normal_form(answer: str, expected: str) -> None:
    assert normalise_answer(answer) == expected


def test_half_is_not_five_and_nothing_equals_nothing() -> None:
    assert not same_answer(".5", "5")
    assert same_answer(".5", "0.50")
    assert not same_answer("", ".")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("a " * 10**6 + "x", "x"),
        ("." * 10**6 + "5", ".5"),
        ("a" + "," * 10**6 + "x", "a" + "," * 10**6 + "x"),
        ("x" + " " * 10**6 + "y", "x y"),
    ],
    ids=["articles", "stops", "commas", "space"],
)
def test_a_megabyte_is_normalised_and_parsed_in_one_pass(answer: str, expected: str) -> None:
    # In quadratic time, each of these would take hours.
    parsed = parse(f"Because.\nAnswer: {answer}")
    assert parsed is not None
    assert parsed.answer == answer
    assert normalise_answer(answer) == (f"0{expected}" if expected == ".5" else expected)
