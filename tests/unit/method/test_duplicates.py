"""What counts as the same statement: wording may differ, content may not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srccore.method.duplicates import is_duplicate, words

LONG = (
    "In the upper left corner of the picture a man with a grey hat is holding a small black dog on "
    "a leash near 12 parked cars"
)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("The red line lies above the blue line.", "The blue line lies above the red line."),
        ("5 is greater than 3.", "3 is greater than 5."),
        ("5 > 3, so it holds.", "5 < 3, so it holds."),
        ("The total is 5 + 3.", "The total is 5 - 3."),
        ("The change is -5 points.", "The change is 5 points."),
        ("The share is 0.5.", "The share is 5."),
        ("It costs $15.", "It costs 15%."),
        (LONG, LONG.replace("is holding", "is not holding")),
        (LONG, LONG.replace("is holding", "isn't holding")),
        (LONG, LONG.replace("12", "13")),
        (LONG, LONG.replace("12 parked", "parked 12")),
        (LONG, LONG.replace("left", "right")),
        (LONG, LONG.replace("black dog", "brown dog")),
        (LONG, LONG.replace("a man", "no man")),
        (LONG, LONG.replace("grey hat", "black hat").replace("black dog", "grey dog")),
        ("It rose by 5 in May.", "It rose to 5 in May."),
        ("All of them can fly.", "Some of them can fly."),
        ("So 2*(3+4) = 14.", "So (2*3)+4 = 14."),
        ("The ratio is 3:4.", "The ratio is 3 4."),
        ("It is 5! = 120.", "It is 5 = 120."),
        ("It is x-y.", "It is x y."),
        ("This bar is clearly taller than that bar.", "That bar is clearly taller than this bar."),
        ("The point A is left of B.", "The point is left of B."),
        ("", "No."),
    ],
)
def test_a_contrast_is_never_a_duplicate(first: str, second: str) -> None:
    # However low the limit is.
    assert not is_duplicate(first, second, 0.01)
    assert not is_duplicate(second, first, 0.01)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("The cat sits.", " the cat,  sits"),
        ("It isn't red.", "It is not red!"),
        ("A well-known 1,000 m race.", "A well known 1000 m race"),
        ("It is red (and tall).", "It is red and tall."),
        ('He says "no".', "He says \u201cno\u201d\u2026"),
        # 9 of 9 and 10 words match: 2 * 9 / (9 + 10) = 0.95.
        ("So the red bar is 2 taller than the blue.", "The red bar is 2 taller than the blue"),
        # 24 of 25 words match: "the" and "a" take each other's place.
        (LONG, LONG.replace("the picture", "a picture")),
        ("", "..."),
    ],
)  # fmt: skip
def test_another_wording_of_the_same_is_a_duplicate(first: str, second: str) -> None:
    assert is_duplicate(first, second, 0.9)
    assert is_duplicate(second, first, 0.9)


def test_short_texts_that_differ_in_small_words_stay_two_unless_the_limit_is_low() -> None:
    # "dog" alone matches: 2 * 1 / (1 + 4) = 0.4.
    assert not is_duplicate("Dog.", "There is a dog.", 0.9)
    assert is_duplicate("Dog.", "There is a dog.", 0.4)


def test_words_by_hand() -> None:
    # The bracket beside a number could be part of a calculation.
    assert words("Isn't 1,000.50 of x-ray #3 (about .5) -7?") == [
        "is", "not", "1000.50", "of", "x", "ray", "#", "3", "about", ".5", ")", "-", "7",
    ]  # fmt: skip


CONTENT = ["red", "blue", "above", "not", "3", "5", "bar", "holds", "of", "more", "left", "never"]
SENTENCES = st.lists(st.sampled_from([*CONTENT, "the", "is", "a"]), min_size=1, max_size=30)


@given(SENTENCES, st.data())
def test_one_other_content_word_is_always_a_contrast(sentence: list[str], data) -> None:
    places = [number for number, word in enumerate(sentence) if word in CONTENT]
    if places:
        place = data.draw(st.sampled_from(places))
        other = data.draw(st.sampled_from([word for word in CONTENT if word != sentence[place]]))
        changed = [*sentence[:place], other, *sentence[place + 1 :]]
        assert not is_duplicate(" ".join(sentence), " ".join(changed), 0.01)


@given(SENTENCES, st.data())
def test_two_content_words_that_trade_places_are_a_contrast(sentence: list[str], data) -> None:
    places = [number for number, word in enumerate(sentence) if word in CONTENT]
    pairs = [(i, j) for i in places for j in places if sentence[i] != sentence[j]]
    if pairs:
        left, right = data.draw(st.sampled_from(pairs))
        changed = sentence[:]
        changed[left], changed[right] = sentence[right], sentence[left]
        assert not is_duplicate(" ".join(sentence), " ".join(changed), 0.01)


@given(SENTENCES, st.sampled_from([" ", "  ", "\n", ", ", "; "]), st.sampled_from(["", ".", "!?"]))
def test_case_white_space_and_punctuation_do_not_matter(
    sentence: list[str], between: str, end: str
) -> None:
    assert is_duplicate(" ".join(sentence), between.join(sentence).upper() + end, 1.0)


@given(st.text(max_size=20), st.text(max_size=20), st.floats(0.1, 1))
def test_it_is_symmetric_and_a_text_is_its_own_duplicate(a: str, b: str, limit: float) -> None:
    assert is_duplicate(a, b, limit) == is_duplicate(b, a, limit)
    assert is_duplicate(a, a, limit)
