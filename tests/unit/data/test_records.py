from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory import peak
from pydantic import ValidationError

from srccore.data.records import (
    Candidate,
    CandidateSet,
    Fact,
    Rating,
    Response,
    read_records,
    write_records,
)
from srccore.errors import UserError

RESPONSES = [
    Response(sample_id="a", text="one\ntwo\u2028three \u00e9", token_count=3, finished=True),
    Response(sample_id="b", text="", token_count=0, finished=False),
]


def rating(*probabilities: float) -> Rating:
    return Rating.model_validate(
        {
            "sample_id": "s",
            "first": "a",
            "second": "b",
            "probabilities": probabilities,
            "mass": 1.0,
        }
    )


def test_a_record_file_holds_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    assert write_records(path, Response, iter(RESPONSES)) == 2
    assert list(read_records(path, Response)) == RESPONSES
    assert [each.name for each in tmp_path.iterdir()] == ["responses.jsonl"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_json_form(text: str) -> None:
    record = Response(sample_id="a", text=text, token_count=1, finished=True)
    line = record.model_dump_json()
    assert "\n" not in line
    assert "\r" not in line
    assert Response.model_validate_json(line) == record


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    write_records(path, Response, RESPONSES)
    with pytest.raises(ZeroDivisionError):
        write_records(path, Response, (RESPONSES[1 // number] for number in (1, 0)))
    assert list(read_records(path, Response)) == RESPONSES
    assert [each.name for each in tmp_path.iterdir()] == ["responses.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "not a record file"),
        ("[]\n", "not a record file"),
        ('{"record": "ratings", "version": 1}\n', "contains ratings version 1"),
        ('{"record": "responses", "version": 2}\n', "contains responses version 2"),
        ('{"record": "responses", "version": 1}\n{}\n', "Line 2 .* sample_id"),
        ('{"record": "responses", "version": 1}\nnot json\n', "Line 2 .* the line"),
        (b'{"record": "responses", "version": 1}\n{"text": "\xff"}\n', "Line 2 .* the line"),
        (b"\xff\n", "not a record file"),
        ("[" * 100_000, "not a record file"),
        ('{"record": "' + "x" * 9999 + '", "version": 1}', "contains x{60} version 1, not"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(
    tmp_path: Path, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / "responses.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        list(read_records(path, Response))


def test_a_rating_is_a_distribution() -> None:
    assert rating(0.2, 0.2, 0.2, 0.2, 0.2).mass == 1
    nan = float("nan")
    for bad in ((0, 0, 0, 0, 0), (0.5, 0.5, 0.5, 0, 0), (-1, 2, 0, 0, 0)):
        with pytest.raises(ValidationError, match="not a distribution"):
            rating(*bad)
    with pytest.raises(ValidationError, match="finite"):
        rating(nan, 0, 0, 0, 1)


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "candidates.jsonl"
    write_records(path, CandidateSet, [])
    candidate = '{"id": "a", "text": "x", "log_probability": -Infinity, "token_count": 1}'
    with path.open("a") as file:
        file.write(f'{{"sample_id": "s", "candidates": [{candidate}]}}\n')
    with pytest.raises(UserError, match=r"candidates\.0\.log_probability: .* finite"):
        list(read_records(path, CandidateSet))


def test_two_candidates_of_one_id_are_refused() -> None:
    candidate = Candidate(id="a", text="x", log_probability=-1, token_count=1)
    with pytest.raises(ValidationError, match="two candidates with the same id"):
        CandidateSet(sample_id="s", candidates=(candidate, candidate))


def test_a_fact_reads_as_a_sentence() -> None:
    assert Fact(subject="the red bar", relation="is", value="3").sentence == "The red bar is 3."


def test_no_candidate_may_pass_for_the_reference() -> None:
    fake = Candidate(id="reference", text="x", log_probability=0, token_count=1)
    with pytest.raises(ValidationError, match="may have the id reference"):
        CandidateSet(sample_id="s", candidates=(fake,))


def test_a_line_without_end_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    write_records(path, Response, RESPONSES[:1])
    with path.open("ab") as file:
        file.truncate(path.stat().st_size + 2**30)

    def refused() -> None:
        with pytest.raises(UserError, match=r"Line 3 of .* is not a valid responses record"):
            list(read_records(path, Response))

    # Of a gigabyte; a line may have 16 MiB.
    assert peak(refused) < 128 * 2**20
