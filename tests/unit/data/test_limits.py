"""Data that is too large, repeats itself or could not be read back is refused where it is read."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory import peak
from PIL import Image

from srccore.data.dataset import open_data, read_samples, validate
from srccore.data.images import ImageError, decode, measure
from srccore.data.limits import MAX_IMAGE_BYTES, MAX_LINE_BYTES
from srccore.data.parquet import ParquetTable
from srccore.data.texts import problems_of
from srccore.errors import UserError
from srccore.method.response import normalise_answer, parse, write


def png(size: tuple[int, int] = (4, 3)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


def row(number: int, **changes: Any) -> dict[str, Any]:
    good = {"id": f"s{number}", "category": "chart", "question": "How many?", "answer": "3"}
    return {**good, "image": png(), **changes}


def parquet(path: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **settings)
    return path


def lines(folder: Path, *rows: str) -> Path:
    (folder / "good.png").write_bytes(png())
    (folder / "samples.jsonl").write_text("\n".join(rows))
    return folder


def line(number: int, **changes: Any) -> str:
    return json.dumps(row(number, image="good.png", **changes))


def reasons(path: Path) -> list[tuple[int, str]]:
    return [(problem.row, problem.reason) for problem in validate(path).problems]


# Texts


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": "3\nor 4"}, "answer has several lines"),
        ({"answer": "3\nAnswer: 4"}, "answer has several lines"),
        ({"answer": " ?! "}, "answer is nothing but punctuation ('?!'), which is ignored"),
        ({"rationale": "So.\n answer : 3\nThus."}, "rationale has a line that starts with"),
        ({"id": "x" * 257}, "id has 257 characters, more than 256"),
        ({"question": "x" * 20_001}, "question has 20,001 characters, more than 20,000"),
        ({"answer": "x" * 1_001}, "answer has 1,001 characters, more than 1,000"),
        ({"rationale": "x" * 20_001}, "rationale has 20,001 characters, more than 20,000"),
    ],
)
def test_a_text_that_could_not_be_read_back_or_is_too_long_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    lines(tmp_path, line(1), line(2, **changes))
    table = parquet(tmp_path / "d.parquet", [row(1, rationale=None), row(2, **changes)])
    for path in (tmp_path / "samples.jsonl", table):
        ((number, found),) = reasons(path)
        assert number == 2
        assert found.startswith(reason)
        for read in (open_data, read_samples):
            with pytest.raises(UserError, match="Row 2"):
                read(path)


PIECES = [*"aA1 .?\n\r\t:(\u2028\x0b", "answer", "Answer:", "the "]
TEXT = st.lists(st.sampled_from(PIECES)).map("".join)


@given(answer=TEXT, rationale=TEXT)
def test_what_is_accepted_is_read_back_from_a_response(answer: str, rationale: str) -> None:
    if not list(problems_of({"answer": answer, "rationale": rationale})):
        parsed = parse(write(rationale, answer))
        assert parsed is not None
        assert (parsed.rationale, parsed.answer) == (rationale.strip(), answer.strip())
        assert normalise_answer(answer) != ""


@given(answer=TEXT, rationale=TEXT)
def test_what_is_refused_could_not_be_read_back(answer: str, rationale: str) -> None:
    parsed = parse(write(rationale, answer))
    if parsed is None or normalise_answer(answer) == "":
        assert list(problems_of({"answer": answer, "rationale": rationale}))


def test_facts_have_limits(tmp_path: Path) -> None:
    fact = {"subject": "the bar", "relation": "is", "value": "3"}
    lines(
        tmp_path,
        line(1, facts=[fact] * 101),
        line(2, facts=[{**fact, "aliases": ["x"] * 101}]),
        line(3, facts=[fact, {**fact, "aliases": ["x" * 1001]}]),
    )
    assert reasons(tmp_path) == [
        (1, "there are 101 facts, more than 100"),
        (2, "facts.0 has 101 aliases, more than 100"),
        (3, "facts.1 has a text of 1,001 characters, more than 1,000"),
    ]


# JSON Lines


def test_a_line_that_is_too_long_is_never_in_memory_and_the_next_one_is_read(
    tmp_path: Path,
) -> None:
    with (lines(tmp_path) / "samples.jsonl").open("w") as file:
        file.write(line(1)[:-1] + ', "rationale": "')
        for _ in range(64):
            file.write("x" * 2**20)
        file.write('"}\n' + line(2) + "\n" + "y" * (MAX_LINE_BYTES + 1))
    found: list[tuple[int, str]] = []
    assert peak(lambda: found.extend(reasons(tmp_path))) < 30 * 2**20
    assert found == [(number, "the line has more than 1048576 bytes") for number in (1, 3)]


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_of_the_longest_length_is_read(tmp_path: Path, end: str) -> None:
    text = line(1)
    whole = text[:-1] + " " * (MAX_LINE_BYTES - len(text)) + "}"
    lines(tmp_path)
    (tmp_path / "samples.jsonl").write_text(whole + end)
    assert len(whole) == MAX_LINE_BYTES
    assert reasons(tmp_path) == []


def test_a_key_that_is_there_twice_is_refused_also_inside_a_fact(tmp_path: Path) -> None:
    twice = line(1)[:-1] + ', "answer": "4"}'
    fact = '{"subject": "a", "relation": "is", "value": "1", "value": "2"}'
    lines(tmp_path, twice, line(2)[:-1] + f', "facts": [{fact}]}}')
    assert reasons(tmp_path) == [(1, "'answer' is there twice"), (2, "'value' is there twice")]


def test_many_unknown_columns_make_a_short_message(tmp_path: Path) -> None:
    lines(tmp_path, line(1, **{f"column-{n:05d}": n for n in range(20_000)}))
    assert reasons(tmp_path) == [
        (
            1,
            "there are no columns 'column-00000', 'column-00001', 'column-00002' and 19,997 more "
            "(known: image, id, category, question, answer, rationale, facts)",
        )
    ]


def test_a_row_with_many_faults_and_a_long_value_make_a_short_message(tmp_path: Path) -> None:
    lines(
        tmp_path,
        line(1, facts=[{"subject": 1}] * 50),
        line(2, category="x" * 10_000),
        json.dumps(row(3, image="y" * 100_000)),
    )
    found = [reason for _, reason in reasons(tmp_path)]
    # A missing relation, a missing value and a wrong subject each.
    assert found[10] == "and 140 more"
    assert max(map(len, found)) < 400


# Parquet


def test_a_text_that_a_dictionary_repeats_is_refused_without_being_repeated(
    tmp_path: Path,
) -> None:
    # 3 KB that stand for 9 GB.
    huge = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), ["x" * 9_000_000])
    ids = [f"s{number}" for number in range(1000)]
    columns = {"id": ids, "category": ["math"] * 1000, "question": huge, "answer": ["3"] * 1000}
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table(columns), path, compression="zstd")
    assert path.stat().st_size < 20_000

    def refused() -> None:
        with pytest.raises(UserError, match="question has 9,000,000 characters, more than 20,000"):
            read_samples(path)

    assert peak(refused) < 100 * 2**20


def test_an_image_that_a_dictionary_repeats_is_in_memory_a_few_times(tmp_path: Path) -> None:
    # A PNG of 20 MB, most of which readers skip, in 50 rows: a gigabyte.
    image = png() + os.urandom(20_000_000)
    columns = {name: [value] * 50 for name, value in row(1).items()}
    columns["id"] = [f"s{number}" for number in range(50)]
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 50, pa.int32()), [image])
    path = tmp_path / "d.parquet"
    # Without Arrow's schema it is read as plain values, as most files are.
    pq.write_table(pa.table({**columns, "image": repeated}), path, store_schema=False)
    assert path.stat().st_size < 25_000_000
    found: list[object] = []
    # Three rows at a time (64 MiB), in Arrow and in Python.
    assert peak(lambda: found.extend(reasons(path))) < 220 * 2**20
    assert found == []


@pytest.mark.parametrize(("size", "rows"), [(500, 64), (300_000, 13), (3_000_000, 1)])
def test_rows_are_read_as_many_at_a_time_as_fit_into_4_mib(
    tmp_path: Path, size: int, rows: int
) -> None:
    count = min(2000, 12_000_000 // size)
    images = [row(n, image=png() + os.urandom(size)) for n in range(count)]
    # 4 MiB / 300 KB is 13.
    path = parquet(tmp_path / "d.parquet", images, use_dictionary=False)
    assert ParquetTable(path)._few(0) == rows


def test_a_column_that_expands_to_many_times_its_size_is_refused_by_the_footer(
    tmp_path: Path,
) -> None:
    rows = [row(number, question="x" * 9_000_000) for number in range(8)]
    path = parquet(tmp_path / "d.parquet", rows, compression="zstd", use_dictionary=False)
    told = r"The column 'question' of .* is stored in [\d,]+ bytes, but stands for 72,0"
    for read in (open_data, read_samples, validate):
        with pytest.raises(UserError, match=told):
            read(path)


def test_repeated_facts_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    kind = pa.list_(pa.struct([(name, pa.string()) for name in ("subject", "relation", "value")]))
    fact = {"subject": "the bar", "relation": "is", "value": "x" * 100_000}
    columns = {name: pa.array([value]) for name, value in row(1).items()}
    for facts in ([fact], [{**fact, "value": "x"}] * 200_000):
        path = tmp_path / "d.parquet"
        pq.write_table(pa.table({**columns, "facts": pa.array([facts], kind)}), path)
        with pytest.raises(UserError, match=r"row of .* have a list or text of [12]00,0"):
            read_samples(path)


def test_facts_of_a_usual_size_are_read_from_any_parquet_file(tmp_path: Path) -> None:
    fact = {"subject": "the bar", "relation": "is", "value": "3", "aliases": ["three"] * 20}
    path = parquet(tmp_path / "d.parquet", [row(1, facts=[fact] * 20)])
    assert len(open_data(path).sample("s1").facts) == 20


def test_many_columns_and_a_column_that_is_there_twice_are_refused(tmp_path: Path) -> None:
    wide = parquet(tmp_path / "wide.parquet", [row(1, **{f"c{n}": n for n in range(20_000)})])
    with pytest.raises(UserError, match=r"wide\.parquet has 20,005 columns, more than 100\."):
        validate(wide)
    table = pa.Table.from_pylist([row(1)])
    pq.write_table(table.append_column("answer", [["4"]]), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice\.parquet has several columns 'answer'\."):
        open_data(tmp_path / "twice.parquet")


# Images


def test_grey_values_of_16_bits_are_scaled(tmp_path: Path) -> None:
    image = Image.new("I;16", (4, 1))
    # 256 * 100 is 100 of 255; 40,000 / 256 = 156.25.
    for place, value in enumerate((0, 25_600, 40_000, 65_535)):
        image.putpixel((place, 0), value)
    file = io.BytesIO()
    image.save(file, "PNG")
    found = decode(file.getvalue())
    assert found.mode == "RGB"
    assert [found.getpixel((place, 0))[0] for place in range(4)] == [0, 100, 156, 255]


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ((10_001, 200), "image is too large: 10001 x 200 pixels, more than 10000 on a side"),
        ((20, 2001), "image is too narrow: 20 x 2001 pixels, more than 100 to 1"),
        ((7_000, 6_000), "image is too large: 7000 x 6000 pixels, more than 40000000"),
    ],
)
def test_an_image_that_a_processor_would_blow_up_is_refused(
    size: tuple[int, int], told: str
) -> None:
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG")
    with pytest.raises(ImageError) as caught:
        measure(file.getvalue())
    assert str(caught.value) == told
    assert measure(png((2000, 20))) == (2000, 20)


def test_an_image_of_too_many_bytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    lines(tmp_path, line(1))
    with (tmp_path / "good.png").open("r+b") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    found: list[tuple[int, str]] = []
    assert peak(lambda: found.extend(reasons(tmp_path))) < 20 * 2**20
    assert found == [(1, "image is too large: 67108865 bytes, more than 67108864")]
