import pytest
from hypothesis import given
from hypothesis import strategies as st

from srccore.method import sentences

PIECES = st.sampled_from(
    [
        "The bar",
        " is ",
        "3.5",
        ". ",
        "? ",
        "! ",
        "\n",
        "e.g. ",
        "No. ",
        "1. ",
        "A. ",
        '."',
        " ",
        "…",
    ]
)
TEXTS = st.one_of(st.text(), st.lists(PIECES).map("".join))


@given(TEXTS)
def test_the_sentences_of_a_text_are_the_text_but_for_white_space(text: str) -> None:
    parts = sentences.split(text)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(part == part.strip() != "" for part in parts)


@given(TEXTS)
def test_a_first_end_lies_behind_something_and_before_white_space(text: str) -> None:
    end = sentences.first_end(text)
    if end is not None:
        assert text[:end].strip()
        assert text[end].isspace()


@given(TEXTS, st.text())
def test_an_end_once_found_stays_where_it_is(text: str, more: str) -> None:
    # The search reads token by token: what comes later must not move a sentence end.
    end = sentences.first_end(text)
    if end is not None:
        assert sentences.first_end(text + more) == end


@given(st.integers(0, 999), st.integers(0, 999))
def test_a_number_is_never_split(whole: int, part: int) -> None:
    assert sentences.split(f"It is {whole}.{part} wide.") == [f"It is {whole}.{part} wide."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The bar is 3. The line is 4.", ["The bar is 3.", "The line is 4."]),
        ("1. Look at it. 2. Count.", ["1. Look at it.", "2. Count."]),
        ("Cats, e.g. Tom, vs. dogs.", ["Cats, e.g. Tom, vs. dogs."]),
        ("It shows J. Smith. He waves.", ["It shows J. Smith.", "He waves."]),
        ("See fig. 3 and no. 5. They fit.", ["See fig. 3 and no. 5.", "They fit."]),
        ("Is it red? No. It is blue.", ["Is it red?", "No.", "It is blue."]),
        ('He says "stop." Then he goes.', ['He says "stop."', "Then he goes."]),
        ("He says \u201cstop.\u201d Then he goes.", ["He says \u201cstop.\u201d", "Then he goes."]),
        ("It is in the U.S.\nAnswer: U.S.", ["It is in the U.S.", "Answer: U.S."]),
        ("no stop\nAnswer: 3", ["no stop", "Answer: 3"]),
        (" \n ", []),
    ],
)
def test_split_ends_sentences_where_a_reader_would(text: str, expected: list[str]) -> None:
    assert sentences.split(text) == expected


def test_a_sentence_that_nothing_follows_has_not_ended() -> None:
    assert sentences.first_end("The bar is 3.") is None
    assert sentences.first_end("The bar is 3. ") == 13
    # "No. " may yet become "No. 5".
    assert sentences.first_end("No. ") is None
    assert sentences.first_end("No. I") == 3


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("." * 10**6 + "x", 1),
        ("a" * 10**6 + ". b", 2),
        ("Mr. " * 10**5, 1),
        ("Yes. " * 10**5, 10**5),
        ('."' * 10**6, 1),
        ("x" + " " * 10**6 + "y", 1),
    ],
    ids=["stops", "a word", "abbreviations", "sentences", "quotes", "space"],
)
def test_a_megabyte_is_split_in_one_pass(text: str, count: int) -> None:
    # In quadratic time, each of these would take hours.
    assert len(sentences.split(text)) == count
