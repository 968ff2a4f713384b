from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srccore.data.records import Category, Sample
from srccore.data.sampling import draw, shard, split
from srccore.errors import UserError

sizes = st.tuples(*[st.integers(0, 12)] * 3)


def pool(counts: tuple[int, ...]) -> list[Sample]:
    return [
        Sample(id=f"{category}-{number}", category=category, question="?", answer="!")
        for category, count in zip(Category, counts, strict=True)
        for number in range(count)
    ]


def by_category(samples: list[Sample]) -> list[int]:
    counts = Counter(s.category for s in samples)
    return [counts[category] for category in Category]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (8, [4, 2, 2]),
        (1, [1, 0, 0]),
        (2, [1, 1, 0]),  # 1, 0.5, 0.5: the tie goes to the first
        (3, [1, 1, 1]),  # 1.5, 0.75, 0.75
        (5, [3, 1, 1]),  # 2.5, 1.25, 1.25
        (22, [11, 6, 5]),  # 11, 5.5, 5.5
    ],
)
def test_a_draw_is_two_to_one_to_one(count: int, expected: list[int]) -> None:
    assert by_category(draw(pool((20, 20, 20)), count, seed=0)) == expected


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((20, 20, 0), [8, 4, 0]),  # 2:1 of 12
        ((2, 20, 20), [2, 5, 5]),  # perception's 6 become 2; the other 10 go 1:1
        ((20, 1, 20), [7, 1, 4]),  # 11 as 2:1 are 7.33 and 3.67
        ((0, 3, 20), [0, 3, 9]),
        ((3, 2, 1), [3, 2, 1]),
    ],
)
def test_where_a_category_is_short_the_others_fill_in(
    counts: tuple[int, ...], expected: list[int]
) -> None:
    assert by_category(draw(pool(counts), 12, seed=0)) == expected


@given(sizes.filter(any), st.integers(1, 40), st.integers(0, 5), st.integers(0, 9), st.randoms())
def test_a_draw_has_its_count_no_sample_twice_and_ignores_input_order(
    counts: tuple[int, ...], count: int, start: int, seed: int, random: Any
) -> None:
    samples = pool(counts)
    drawn = draw(samples, count, seed=seed, start=start)
    assert len(drawn) == min(count, len(samples))
    assert len({s.id for s in drawn}) == len(drawn)
    random.shuffle(samples)
    assert draw(samples, count, seed=seed, start=start) == drawn


@given(sizes.filter(any), st.integers(1, 40), st.integers(0, 9))
def test_consecutive_draws_share_no_sample_until_a_category_is_used_up(
    counts: tuple[int, ...], count: int, seed: int
) -> None:
    samples = pool(counts)
    rounds = [draw(samples, count, seed=seed, start=start) for start in range(3)]
    for category, size in zip(Category, counts, strict=True):
        ids = [s.id for drawn in rounds for s in drawn if s.category is category]
        # A quota q per draw: three draws are a walk of 3 q steps around the category.
        assert len(set(ids)) == min(len(ids), size)


def test_another_seed_draws_other_samples() -> None:
    samples = pool((50, 50, 50))
    assert draw(samples, 12, seed=0) != draw(samples, 12, seed=1)


@pytest.mark.parametrize(("samples", "count", "start"), [([], 1, 0), (1, 0, 0), (1, 1, -1)])
def test_an_impossible_draw_is_refused(samples: Any, count: int, start: int) -> None:
    with pytest.raises(UserError):
        draw(pool((1, 1, 1)) if samples else [], count, seed=0, start=start)


@given(
    sizes,
    st.dictionaries(st.sampled_from("abcd"), st.floats(0, 9), min_size=1).filter(
        lambda shares: sum(shares.values()) > 0
    ),
    st.integers(0, 9),
    st.randoms(),
)
def test_splits_are_disjoint_complete_and_unmoved_by_order_and_other_samples(
    counts: tuple[int, ...], shares: dict[str, float], seed: int, random: Any
) -> None:
    samples = pool(counts)
    parts = split(samples, shares, seed)
    assert list(parts) == list(shares)
    assert sorted(s.id for part in parts.values() for s in part) == sorted(s.id for s in samples)
    others = [Sample(id=f"s{n}", category="chart", question="?", answer="!") for n in range(5)]
    more = [*samples, *others]
    random.shuffle(more)
    larger = split(more, shares, seed)
    for name, part in parts.items():
        assert {s.id for s in part} <= {s.id for s in larger[name]}
        assert shares[name] > 0 or not larger[name]


def test_splits_have_about_their_shares() -> None:
    parts = split(pool((2000, 1000, 1000)), {"train": 3, "heldout": 1}, seed=0)
    # Binomial: 4000 x 0.75 = 3000, sd 27; five of those.
    assert abs(len(parts["train"]) - 3000) < 137


@pytest.mark.parametrize(
    "shares", [{}, {"a": 0.0}, {"a": 1.0, "b": -0.5}, {"a": float("nan")}, {"a": float("inf")}]
)
def test_shares_that_are_none_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(UserError, match="Cannot split samples by"):
        split(pool((1, 1, 1)), shares, seed=0)


@given(sizes, st.integers(1, 6), st.randoms())
def test_shards_are_disjoint_complete_and_unmoved_by_order(
    counts: tuple[int, ...], count: int, random: Any
) -> None:
    samples = pool(counts)
    shards = [shard(samples, index, count) for index in range(count)]
    assert sorted(s.id for part in shards for s in part) == sorted(s.id for s in samples)
    random.shuffle(samples)
    for index, part in enumerate(shards):
        assert {s.id for s in shard(samples, index, count)} == {s.id for s in part}


def test_shards_of_a_draw_are_about_equal() -> None:
    drawn = draw(pool((2000, 1000, 1000)), 1000, seed=0)
    # Binomial: 1000 / 4 = 250, sd 13.7; five of those.
    assert all(abs(len(shard(drawn, index, 4)) - 250) < 69 for index in range(4))


@pytest.mark.parametrize(("index", "count"), [(0, 0), (1, 1), (-1, 2), (0, -1)])
def test_a_shard_out_of_range_is_refused(index: int, count: int) -> None:
    with pytest.raises(UserError, match=f"no shard {index} of {count}"):
        shard([], index, count)
