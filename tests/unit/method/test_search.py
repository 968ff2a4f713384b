"""The search, worked out by hand with a toy engine of known probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import TREE, ToyEngine, prompt

from srccore.config import SearchConfig
from srccore.hashing import stable_hash
from srccore.method.driver import Search, drive
from srccore.method.search import Beam, search, select, similarity

# A policy that mostly writes a bare answer, or a rationale without one.
TERSE = {
    "": {"Answer: A": 0.9, " red is 3.": 0.1},
    " red is 3.": {"\nAnswer: B": 0.1, " STOP": 0.9},
}


def _config(**changes: object) -> SearchConfig:
    values: dict[str, object] = {
        "samples": 1,
        "width": 4,
        "branch": 40,  # Enough draws to meet every child.
        "diverse": 0,
        "candidates": 4,
        "similarity": 1.0,
    }
    return SearchConfig.model_validate(values | changes)


def _search(
    config: SearchConfig,
    ids: Sequence[str] = ("s",),
    round_number: int = 1,
    tree: dict[str, dict[str, float]] = TREE,
    batch: int = 100,
    **engine_settings: Any,
):
    engine = ToyEngine(tree, **engine_settings)
    searches = [
        Search(
            prompt(name),
            partial(search, sample_id=name, config=config, seed=0, round_number=round_number),
        )
        for name in ids
    ]
    batches = [searches[start : start + batch] for start in range(0, len(searches), batch)]
    return engine, [result for found in drive(engine, batches) for result in found]


def test_all_responses_of_the_toy_are_found_and_ranked_by_mean_log_probability() -> None:
    _, (found,) = _search(_config())
    # red.A: ln .6 + ln .5 = -1.204, mean -.602     blue.B: ln .4 + ln .9 = -1.022, mean -.511
    # red.seven.D: ln .6 + ln .5 + ln 1 = -1.204, mean -.401
    # blue.C: ln .4 + ln .1 = -3.219, mean -1.609
    # Round 2 keeps the best four of {seven -.602, A -.602, B -.511, C -1.609}: all of them; A, B
    # and C are finished, so the pool holds three, and D joins it in round 3.
    assert [candidate.text for candidate in found.candidates] == [
        "red is 3. so seven.\nAnswer: D",
        "blue is 5.\nAnswer: B",
        "red is 3.\nAnswer: A",
        "blue is 5.\nAnswer: C",
    ]
    assert [round(c.log_probability, 3) for c in found.candidates] == [
        -1.204,
        -1.022,
        -1.204,
        -3.219,
    ]
    assert [c.token_count for c in found.candidates] == [3, 2, 2, 2]


def test_a_round_draws_width_times_branch_at_the_root_and_branch_per_beam_after() -> None:
    engine, _ = _search(_config())
    # Root: 4 * 40. Round 2: two beams (red, blue), 40 each. Round 3: one beam (seven).
    assert engine.calls == [160, 80, 40]
    assert engine.opened == [["s"]]


def test_the_search_ends_when_the_pool_is_full_and_cuts_a_surplus_by_rank() -> None:
    engine, (found,) = _search(_config(candidates=2))
    # After round 2 the pool holds A, B and C; the two best stay.
    assert [candidate.text[-1] for candidate in found.candidates] == ["B", "A"]
    assert len(engine.calls) == 2


def test_equal_ranks_are_broken_by_the_hash_of_the_text() -> None:
    # Round 2, width 2: B -.511 comes first; A and seven tie at -.602.
    _, (found,) = _search(_config(width=2, branch=80, candidates=2))
    tied = min(" red is 3. so seven.", " red is 3.\nAnswer: A", key=stable_hash)
    third = "A" if tied.endswith("A") else "D"
    assert {candidate.text[-1] for candidate in found.candidates} == {"B", third}


def test_beams_that_live_at_max_sentences_get_one_draw_to_the_end() -> None:
    _, (found,) = _search(_config(max_sentences=2))
    assert "red is 3. so seven.\nAnswer: D" in [candidate.text for candidate in found.candidates]
    assert found.unfinished == 0


def test_the_draws_of_a_sample_depend_on_no_other_sample() -> None:
    narrow = _config(width=2, branch=1, candidates=2)
    ids = [f"sample {number}" for number in range(20)]
    together = _search(narrow, ids)[1]
    alone = [_search(narrow, [name])[1][0] for name in ids]
    assert together == alone
    assert len({record.candidates for record in together}) > 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_the_order_in_which_draws_finish_changes_nothing(
    batch: int, in_flight: int, shuffle: int
) -> None:
    config = _config(width=2, branch=2, candidates=3)
    ids = [f"sample {number}" for number in range(12)]
    in_order = _search(config, ids)[1]
    shuffled = _search(config, ids, batch=batch, in_flight=in_flight, shuffle=shuffle)[1]
    assert {each.sample_id: each for each in shuffled} == {e.sample_id: e for e in in_order}


def test_another_round_draws_afresh() -> None:
    narrow = _config(width=1, branch=1, candidates=2)
    ids = [f"sample {number}" for number in range(20)]
    first, second = (
        [record.candidates[0].text for record in _search(narrow, ids, number)[1]]
        for number in (1, 2)
    )
    assert first != second


def test_plain_sampling_draws_whole_responses_until_it_has_enough_of_them() -> None:
    # The toy has four responses, so eight are never found.
    engine, (found,) = _search(_config(strategy="sample", candidates=8, fill_attempts=3))
    assert engine.calls == [8, 8, 8]
    assert 1 <= len(found.candidates) <= 4
    engine, (found,) = _search(_config(strategy="sample", candidates=2, fill_attempts=50))
    assert len(found.candidates) == 2
    assert len(engine.calls) < 50


@pytest.mark.parametrize("strategy", ["beam", "sample"])
def test_only_a_rationale_with_an_answer_is_a_candidate(strategy: str) -> None:
    config = _config(strategy=strategy, candidates=2, fill_attempts=300)
    _, (found,) = _search(config, tree=TERSE)
    assert [candidate.text for candidate in found.candidates] == ["red is 3.\nAnswer: B"]
    assert found.unparsed > 0
    assert found.unfinished == 0


def test_bare_answers_take_no_beam_from_a_rationale() -> None:
    # With 160 draws from the root both children are met; the bare answer is nine times likelier,
    # so it would be the only beam of width 1.
    _, (found,) = _search(_config(width=1, branch=160, candidates=2, fill_attempts=1), tree=TERSE)
    assert [candidate.text for candidate in found.candidates] == ["red is 3.\nAnswer: B"]


def test_every_response_is_a_candidate_or_unparsed_or_unfinished() -> None:
    tree = {"": {"Answer: A": 0.5, " .\nAnswer: A": 0.3, " STOP": 0.2}}
    config = _config(strategy="sample", candidates=5, fill_attempts=2)
    engine, (found,) = _search(config, tree=tree)
    # The rationale of the second is a full stop: no word.
    assert (found.candidates, found.unparsed) == ((), sum(engine.calls))


def test_a_short_pool_is_filled_with_whole_responses_that_the_beams_did_not_draw() -> None:
    # Two draws from the root, and one beam: one candidate at most. Each attempt draws four more.
    narrow = _config(width=1, branch=2, max_sentences=3, fill_attempts=5)
    engine, (found,) = _search(narrow)
    assert engine.calls[0] == 2
    assert set(engine.calls[-1:]) == {4}
    assert len(found.candidates) > 1
    seeds = [stable_hash(f"0/1/s/{number}/") for number in range(engine.calls[0] + 20)]
    drawn = [seed for seed in engine.seeds if seed in seeds]
    assert len(drawn) == len(set(drawn)) == 2 + sum(calls == 4 for calls in engine.calls) * 4


def test_responses_with_the_same_words_are_one_candidate() -> None:
    tree = {"": {" It is 3.\nAnswer: A": 0.5, " it is 3!\nAnswer: a.": 0.5}}
    _, (found,) = _search(_config(strategy="sample"), tree=tree)
    assert len(found.candidates) == 1


def test_near_identical_siblings_count_as_one_and_the_likelier_stays() -> None:
    config = _config(similarity=0.9)
    # {the, cat, sits} both: index 1.
    likely, unlikely = Beam(" the cat sits.", -1.0, 4), Beam(" The cat, sits.", -2.0, 4)
    assert select([[unlikely, likely]], config) == [likely]


@pytest.mark.parametrize(
    ("likely", "unlikely"),
    [
        (" The red line lies above the blue line.", " The blue line lies above the red line."),
        (" 5 is greater than 3.", " 3 is greater than 5."),
    ],
)
def test_siblings_that_contradict_each_other_both_stay(likely: str, unlikely: str) -> None:
    siblings = [Beam(likely, -1.0, 8), Beam(unlikely, -2.0, 8)]
    assert select([siblings], _config(similarity=0.9)) == siblings


def test_siblings_are_compared_by_what_they_add_and_not_by_what_they_share() -> None:
    config = _config(similarity=0.9)
    shared = " The red bar is 3. The blue bar is 5. The green bar is 2."
    # The whole texts share 10 of 11 words: 0.91.
    right, wrong = (
        Beam(f"{shared} 5 minus 2 is {result}.", score, 20, parent_length=len(shared))
        for result, score in ((3, -1.0), (4, -2.0))
    )
    assert similarity(right.text, wrong.text) >= 0.9
    assert select([[right, wrong]], config) == [right, wrong]


def test_the_diverse_place_goes_to_the_beam_least_like_those_kept() -> None:
    config = _config(width=2, diverse=1)
    best = Beam("a b c", -1.0, 3)
    # Similarity to `best`: a b d: 2/4; x y z: 0/6. The second is far less likely, but is kept.
    near, far = Beam("a b d", -1.2, 3), Beam("x y z", -9.0, 3)
    assert select([[near, best, far]], config) == [best, far]


def test_the_jaccard_index_of_word_sets() -> None:
    assert similarity("The red bar is 3.", "the red bar is 5") == pytest.approx(4 / 6)
    assert similarity("", "") == 1.0


@given(
    st.lists(
        st.tuples(st.text("abc ", min_size=1, max_size=6), st.floats(-9, 0)),
        max_size=12,
        unique_by=lambda pair: pair[0],
    ),
    st.randoms(use_true_random=False),
)
def test_what_is_kept_does_not_depend_on_the_order_of_siblings(drawn, random) -> None:
    beams = [Beam(text, score, 2) for text, score in drawn]
    shuffled = beams[:]
    random.shuffle(shuffled)
    config = _config(similarity=0.9, diverse=1)
    assert select([beams], config) == select([shuffled], config)
