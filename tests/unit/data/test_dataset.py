from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak
from PIL import Image

from srccore.data import dataset, images, parquet
from srccore.data.dataset import (
    RowProblem,
    content_hash,
    open_data,
    read_samples,
    stream_data,
    validate,
    write_data,
)
from srccore.data.records import Category, Fact, Sample
from srccore.data.texts import problems_of
from srccore.errors import UserError


def png(color: str = "red", size: tuple[int, int] = (4, 3)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def sample(number: int, category: Category = Category.CHART, **more: Any) -> Sample:
    return Sample(id=f"s{number}", category=category, question="How many?", answer="3", **more)


def line(number: int, **changes: Any) -> dict[str, Any]:
    """A good row except for the changes; a column that is changed to `...` is left out."""
    row = {
        "id": f"s{number}",
        "category": "chart",
        "image": "good.png",
        "question": "How many?",
        "answer": "3",
    } | changes
    return {name: value for name, value in row.items() if value is not ...}


def write_lines(folder: Path, rows: list[dict[str, Any] | str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "good.png").write_bytes(png())
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def noisy_jpeg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(file, "JPEG")
    return file.getvalue()


TRUNCATED = noisy_jpeg()[:600]


def noise(size: int) -> bytes:
    """A PNG of that many bytes: one pixel, and random bytes that every reader skips."""
    pixel = png(size=(1, 1))
    return pixel + os.urandom(size - len(pixel))


@pytest.fixture
def small_images_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 10_000)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def reasons(path: Path) -> list[tuple[int, str]]:
    return [(problem.row, problem.reason) for problem in validate(path).problems]


# Reading and writing


def test_a_data_set_with_facts_comes_back_from_parquet_as_it_was_written(tmp_path: Path) -> None:
    fact = Fact(subject="the red bar", relation="is", value="3", aliases=("three",), needed=False)
    samples = [
        sample(1, facts=(fact, Fact(subject="the bar", relation="is", value="red"))),
        sample(2, Category.MATH, rationale="One and two."),
    ]
    path = tmp_path / "data.parquet"
    assert write_data(path, [(samples[0], png("red")), (samples[1], png("blue"))]) == 2
    data = open_data(path)
    assert list(data) == samples
    assert len(data) == 2
    assert data.sample("s2") == samples[1]
    assert data.encoded("s2") == png("blue")
    image = data.image("s2")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 3), (0, 0, 255))
    assert files(tmp_path) == {"data.parquet", "data.index.jsonl"}


def test_a_data_set_with_facts_is_read_from_json_lines(tmp_path: Path) -> None:
    fact = {"subject": "the bar", "relation": "is", "value": "3"}
    folder = write_lines(tmp_path, [line(1, facts=[fact], rationale=None), "", line(2)])
    expected = [sample(1, facts=(Fact(**fact),)), sample(2)]
    for path in (folder, folder / "samples.jsonl"):
        data = open_data(path)
        assert list(data) == expected
        assert data.image("s1").getpixel((0, 0)) == (255, 0, 0)
        assert data.encoded("s2") == png()
    assert validate(folder).problems == ()


def test_hugging_face_datasets_sees_images_and_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    fact = Fact(subject="the bar", relation="is", value="3", aliases=("three",))
    path = tmp_path / "data.parquet"
    write_data(path, [(sample(1, facts=(fact,)), png("blue")), (sample(2), png("red"))])
    data = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(data.features["image"], datasets.Image)
    assert data[0]["image"].getpixel((0, 0)) == (0, 0, 255)
    assert data[0]["facts"] == [fact.model_dump(mode="json")]
    assert data[1]["facts"] == []
    # And the other way round: this module reads what `datasets` writes.
    data.to_parquet(str(tmp_path / "theirs.parquet"))
    theirs = open_data(tmp_path / "theirs.parquet")
    assert list(theirs) == [sample(1, facts=(fact,)), sample(2)]
    assert theirs.image("s2").getpixel((0, 0)) == (255, 0, 0)


def test_a_folder_of_parquet_files_is_one_data_set_in_the_order_of_their_names(
    tmp_path: Path,
) -> None:
    write_data(tmp_path / "b.parquet", [(sample(3), png("blue"))])
    write_data(tmp_path / "a.parquet", [(sample(n), png()) for n in (1, 2)])
    data = open_data(tmp_path)
    assert [s.id for s in data] == ["s1", "s2", "s3"]
    assert data.image("s3").getpixel((0, 0)) == (0, 0, 255)


def test_images_are_found_across_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_GROUP_ROWS", 256)
    path = tmp_path / "data.parquet"
    rows = ((sample(n), png(size=(1 + n % 7, 1 + n // 7))) for n in range(600))
    assert write_data(path, rows) == 600
    assert pq.read_metadata(path).num_row_groups == 3  # 256 + 256 + 88
    data = open_data(path)
    for number in (0, 599, 255, 256, 1):
        assert data.image(f"s{number}").size == (1 + number % 7, 1 + number // 7)


@pytest.fixture
def groups_of_2_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 2 * 2**20)


@pytest.mark.usefixtures("groups_of_2_mib")
def test_a_group_has_few_bytes_since_the_writer_keeps_it_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    large = [noise(100_000), noise(3 * 2**20), noise(900_000), noise(1_000_000), noise(200_000)]
    write_data(path, [(sample(n), encoded) for n, encoded in enumerate(large)])
    metadata = pq.read_metadata(path)
    # 2 MiB at most: 0.1 MB; 3 MiB alone; 0.9 and 1 MB; 0.2 MB, since 2.1 MB is more than 2 MiB.
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [1, 1, 2, 1]
    data = open_data(path)
    assert [data.encoded(f"s{n}") for n in range(5)] == large


def test_a_plain_binary_image_column_and_absent_optional_columns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist([line(1, image=png())]), path)
    data = open_data(path)
    assert list(data) == [sample(1)]
    assert data.image("s1").size == (4, 3)


def test_gray_and_transparent_and_rotated_images_come_as_upright_rgb(tmp_path: Path) -> None:
    folder = write_lines(
        tmp_path, [line(1, image="gray.png"), line(2, image="clear.png"), line(3, image="r.jpg")]
    )
    Image.new("L", (2, 2), 9).save(folder / "gray.png")
    Image.new("RGBA", (2, 2), (1, 2, 3, 4)).save(folder / "clear.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: turned by 90 degrees
    Image.new("RGB", (4, 2)).save(folder / "r.jpg", exif=rotated)
    data = open_data(folder)
    assert data.image("s1").getpixel((0, 0)) == (9, 9, 9)
    assert data.image("s2").mode == "RGB"
    assert data.image("s3").size == (2, 4)
    assert [data.size(name) for name in ("s1", "s2", "s3")] == [(2, 2), (2, 2), (2, 4)]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    write_data(path, [(sample(1), png())])

    def failing() -> Any:
        yield sample(2), png()
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_data(path, failing())
    assert list(open_data(path)) == [sample(1)]
    assert files(tmp_path) == {"data.parquet", "data.index.jsonl"}


def test_an_unknown_sample_is_told(tmp_path: Path) -> None:
    write_data(tmp_path / "d.parquet", [(sample(n), png(size=(n, 1))) for n in (1, 3)])
    data = open_data(tmp_path / "d.parquet")
    assert data.image("s3").size == (3, 1)
    for ask in (data.sample, data.image, data.encoded):
        with pytest.raises(UserError, match="no sample 's2'"):
            ask("s2")


def test_the_hash_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    first = content_hash(write_lines(tmp_path / "one", [line(1), line(2)]))
    assert len(first) == 64
    assert content_hash(write_lines(tmp_path / "two", [line(1), line(2)])) == first
    (tmp_path / "two" / "good.png").write_bytes(png("blue"))
    assert content_hash(tmp_path / "two") != first
    write_data(tmp_path / "a.parquet", [(sample(1), png())])
    write_data(tmp_path / "b.parquet", [(sample(1), png())])
    assert content_hash(tmp_path / "a.parquet") == content_hash(tmp_path / "b.parquet")


# What is read


def bytes_read() -> int:
    """What this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_opening_what_was_written_reads_no_image_and_an_image_costs_its_own_bytes(
    tmp_path: Path,
) -> None:
    path = tmp_path / "data.parquet"
    write_data(path, ((sample(n), noise(400_000)) for n in range(40)))
    open_data(path).image("s0")  # imports what is imported at the first use
    before = bytes_read()
    data = open_data(path)
    assert len(read_samples(path)) == 40
    assert data.size("s7") == (1, 1)
    assert bytes_read() - before < 50_000  # of 16 MB: 40 lines, read twice
    before = bytes_read()
    for number in range(0, 40, 8):
        data.image(f"s{number}")
    # Two reads of at most 4 KiB for the line of each sample.
    assert bytes_read() - before < 5 * (400_000 + 2 * 4096) + 10_000


def test_a_data_set_is_streamed_with_each_byte_read_once(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    images = [noise(100_000) for _ in range(40)]
    table = pa.Table.from_pylist([line(n, image=each) for n, each in enumerate(images)])
    pq.write_table(table, path, row_group_size=16)
    list(stream_data(path))
    before = bytes_read()
    assert [(s.id, encoded()) for s, encoded in stream_data(path)] == [
        (f"s{n}", each) for n, each in enumerate(images)
    ]
    assert bytes_read() - before < 1.2 * path.stat().st_size


@pytest.mark.usefixtures("groups_of_2_mib")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    for count in (20, 200):
        path = tmp_path / f"{count}.parquet"
        rows = ((sample(n), noise(400_000)) for n in range(count))
        written = peak(lambda rows=rows, path=path: write_data(path, rows))
        data = open_data(path)
        streamed = peak(lambda path=path: [len(encoded()) for _, encoded in stream_data(path)])
        read = peak(lambda data=data: [data.image(each.id).size for each in data])
        # Of 80 MB; the first few are for what is imported and what allocators keep.
        assert max(written, streamed, read) < 30 * 2**20


def test_one_huge_group_from_elsewhere_is_read_a_page_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "huge.parquet"
    images = [noise(50_000) for _ in range(1200)]
    table = pa.Table.from_pylist([line(n, image=each) for n, each in enumerate(images)])
    pq.write_table(table, path, use_dictionary=False, write_batch_size=20)
    assert pq.read_metadata(path).num_row_groups == 1
    del table
    opened: list[dataset.DataSet] = []
    # 60 MB in pages of 1 MB.
    assert peak(lambda: opened.append(open_data(path))) < 25 * 2**20
    before = bytes_read()
    for number in (599, 0, 300):
        assert opened[0].encoded(f"s{number}") == images[number]
    assert bytes_read() - before < 4 * 50_000


def test_several_threads_read_one_data_set(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    write_data(path, ((sample(n), png(size=(1 + n, 2))) for n in range(64)))
    data = open_data(path)
    with ThreadPoolExecutor(8) as threads:
        sizes = list(threads.map(lambda n: data.image(f"s{n}").size, range(64)))
    assert sizes == [(1 + n, 2) for n in range(64)]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
FACTS = st.builds(
    Fact,
    subject=TEXTS,
    relation=TEXTS,
    value=TEXTS,
    aliases=st.lists(st.text(st.characters(exclude_categories=["Cs"]))).map(tuple),
    visual=st.booleans(),
)
SAMPLES = st.builds(
    Sample,
    id=TEXTS,
    category=st.sampled_from(Category),
    question=TEXTS,
    answer=TEXTS.filter(lambda text: not list(problems_of({"answer": text}))),
    rationale=st.none() | TEXTS.filter(lambda text: not list(problems_of({"rationale": text}))),
    facts=st.lists(FACTS, max_size=2).map(tuple),
)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(SAMPLES, max_size=12, unique_by=lambda each: each.id),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=12, max_size=12),
    st.integers(1, 400),
)
def test_any_samples_come_back_from_groups_of_any_size(
    samples: list[Sample], sizes: list[tuple[int, int]], group_bytes: int
) -> None:
    rows = [(each, png(size=size)) for each, size in zip(samples, sizes, strict=False)]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(parquet, "_GROUP_BYTES", group_bytes)
        path = Path(folder) / "data.parquet"
        assert write_data(path, rows) == len(rows)
        data = open_data(path)
        assert list(data) == samples == read_samples(path)
        for (each, encoded), size in zip(rows, sizes, strict=False):
            assert data.encoded(each.id) == encoded
            assert data.image(each.id).size == data.size(each.id) == size
        assert [(each, encoded()) for each, encoded in stream_data(path)] == rows
        if rows:
            assert validate(path).problems == ()


# Changed after it was written


def rewritten(path: Path, **columns: list[Any]) -> None:
    """Writes a data set again with other values, as somebody with pyarrow would."""
    table = pq.read_table(path)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        field = table.schema.field(name)
        table = table.set_column(place, field, pa.array(values, field.type))
    pq.write_table(table, path)


def changed_index(path: Path, number: int, **image: Any) -> None:
    """Changes what the index says about the image of a row, numbered from 0."""
    index = path.with_suffix(".index.jsonl")
    lines = index.read_text().splitlines()
    entry = json.loads(lines[number])
    entry["image"] |= image
    lines[number] = json.dumps(entry)
    index.write_text("\n".join([*lines, ""]))


def test_an_image_that_was_changed_after_writing_is_refused_when_it_is_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "data.parquet"
    write_data(path, [(sample(1), png()), (sample(2), png("blue"))])
    path.write_bytes(path.read_bytes().replace(png("blue"), png("blue")[:-1] + b"?"))
    data = open_data(path)
    assert data.image("s1").size == (4, 3)
    changed = "image differs from its SHA-256: the file was changed or is damaged"
    for read in (data.image, data.encoded):
        with pytest.raises(UserError, match=rf"Sample 's2' of .*: {changed}\."):
            read("s2")
    assert reasons(path) == [(2, changed)]
    with pytest.raises(UserError, match=f"Row 2 of .*: {changed}"):
        list(stream_data(path))


def test_a_file_that_was_written_again_no_longer_fits_its_index(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    write_data(path, [(sample(n), png()) for n in (1, 2)])
    rewritten(path, answer=["3", "4"])
    index = path.with_suffix(".index.jsonl")
    for read in (open_data, read_samples, validate, content_hash):
        with pytest.raises(UserError, match=f"{index} does not describe {path}.*Delete {index}"):
            read(path)
    index.unlink()
    assert [each.answer for each in open_data(path)] == ["3", "4"]
    assert open_data(path).image("s2").size == (4, 3)


@pytest.mark.parametrize("left", [0, 1, 100, -1])
def test_an_index_that_was_cut_off_is_refused(tmp_path: Path, left: int) -> None:
    path = tmp_path / "data.parquet"
    write_data(path, [(sample(n), png()) for n in (1, 2)])
    index = path.with_suffix(".index.jsonl")
    index.write_bytes(index.read_bytes()[:left])
    with pytest.raises(UserError, match="does not describe"):
        open_data(path)


def test_an_index_that_has_a_sample_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    write_data(path, [(sample(n), png()) for n in (1, 2)])
    index = path.with_suffix(".index.jsonl")
    first, _, last = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(first + first + last)
    with pytest.raises(UserError, match=r"index of .* has the sample 's1' twice"):
        open_data(path)


def test_a_wrong_description_of_an_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    write_data(path, [(sample(n), png()) for n in (1, 2, 3)])
    changed_index(path, 1, width=5)
    with pytest.raises(UserError, match="image has 4 x 3 pixels, but should have 5 x 3"):
        open_data(path).image("s2")
    assert reasons(path) == [(2, "image has 4 x 3 pixels, but should have 5 x 3")]
    changed_index(path, 0, sha256="x")
    with pytest.raises(
        UserError, match=r"Line 1 of .*data\.index\.jsonl is damaged: String should"
    ):
        open_data(path)


def test_a_file_that_is_cut_off_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    write_data(path, [(sample(n), noise(1_500_000)) for n in (1, 2)])
    data = open_data(path)
    os.truncate(path, 1_000_000)
    with pytest.raises(UserError, match="differs from its SHA-256"):
        data.image("s2")
    path.unlink()
    with pytest.raises(UserError, match=r"image cannot be read \(No such file or directory\)"):
        data.image("s2")


# With the index alone


def test_texts_and_sizes_need_only_the_index(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    write_data(path, [(sample(n), png(size=(n, 2))) for n in (1, 2)])
    identity = content_hash(path)
    path.unlink()
    data = open_data(path)
    assert list(data) == read_samples(path) == [sample(1), sample(2)]
    assert data.size("s2") == (2, 2)
    assert content_hash(path) == identity


def test_an_image_of_several_samples_has_one_key(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    write_data(path, [(sample(1), png()), (sample(2), png("blue")), (sample(3), png())])
    data = open_data(path)
    keys = [data.image_key(f"s{n}") for n in (1, 2, 3)]
    assert keys == [hashlib.sha256(png(each)).hexdigest() for each in ("red", "blue", "red")]
    # Without an index the images would have to be read first.
    lines = open_data(write_lines(tmp_path / "lines", [line(1), line(2)]))
    assert [lines.image_key(f"s{n}") for n in (1, 2)] == ["s1", "s2"]


def test_a_data_set_of_any_format_can_be_sent_to_another_process(tmp_path: Path) -> None:
    write_data(tmp_path / "data.parquet", [(sample(1), png())])
    pq.write_table(pa.Table.from_pylist([line(1, image=png())]), tmp_path / "theirs.parquet")
    lines = write_lines(tmp_path / "lines", [line(1)])
    for path in (tmp_path / "data.parquet", tmp_path / "theirs.parquet", lines):
        opened = open_data(path)
        sent = pickle.loads(pickle.dumps(opened))
        assert sent.encoded("s1") == opened.encoded("s1") == png()
        assert list(sent) == [sample(1)]


def test_an_opened_data_set_takes_a_few_hundred_bytes_per_sample(tmp_path: Path) -> None:
    path, count = tmp_path / "data.parquet", 2000
    image = png()
    texts = {"question": "What is it? " * 40, "rationale": "It is so. " * 200}
    rows = ((sample(n).model_copy(update=texts), image) for n in range(count))
    write_data(path, rows)
    open_data(path)  # imports
    tracemalloc.start()
    data = open_data(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data) == count
    # An id, a number and their place in a dictionary; the texts have 2.5 KB.
    assert held < 250 * count


# Bad rows


@pytest.mark.usefixtures("small_images_only")
def test_every_bad_row_of_json_lines_is_told_with_its_number_and_reason(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(png())
    folder = write_lines(
        tmp_path / "data",
        [
            line(1),
            line(2, image="none.png"),
            line(3, image="text.png"),
            line(4, image="cut.jpg"),
            line(5, image="large.png"),
            line(6, question=" ", answer=""),
            line(1),
            line(8, category="poetry"),
            line(9, image="../outside/secret.png"),
            line(10, image=str(folder_image := tmp_path / "data" / "good.png")),
            line(11, image="link.png"),
            line(12, image="door/secret.png"),
            line(13, question=..., image=...),
            line(14, answer=3, facts=[{"subject": "a", "relation": "is"}]),
            "{not json",
            '"a text"',
            line(17, rational="a typo"),
            line(18, image="circle.png"),
            line(19, image="a\0b"),
            line(20, image="."),
            line(21, image=7),
            line(22, category=None, id=""),
            line(23, category="math", image="inside.png"),
        ],
    )
    assert folder_image.is_file()
    (folder / "text.png").write_text("no image")
    (folder / "cut.jpg").write_bytes(TRUNCATED)
    (folder / "large.png").write_bytes(png(size=(101, 100)))
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "door").symlink_to(outside)
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "inside.png").symlink_to(folder / "good.png")

    report = validate(folder)
    expected = [
        (2, "image file 'none.png' is missing"),
        (3, "image is corrupt or in none of the formats PNG, JPEG, WEBP, GIF, BMP"),
        (4, "image is corrupt (image file is truncated"),
        (5, "image is too large: 101 x 100 pixels, more than 10000"),
        (6, "question is empty"),
        (6, "answer is empty"),
        (7, "id 's1' is already used by row 1"),
        (8, "category 'poetry' is unknown (known: perception, chart, math)"),
        (9, "image path '../outside/secret.png' is outside the data set's folder"),
        (10, f"image path '{folder_image}' is outside the data set's folder"),
        (11, "image path 'link.png' is outside the data set's folder"),
        (12, "image path 'door/secret.png' is outside the data set's folder"),
        (13, "image is missing"),
        (13, "question is missing"),
        (14, "answer: Input should be a valid string"),
        (14, "facts.0.value: Field required"),
        (15, "the line is not JSON ("),
        (16, "the line is not a JSON object"),
        (17, "there is no column 'rational' (known: image, id, category, question,"),
        (18, "image path 'circle.png' cannot be resolved ("),
        (19, "image path 'a\\x00b' cannot be resolved ("),
        (20, "image file '.' is missing"),
        (21, "image is not a path"),
        (22, "category is missing"),
        (22, "id is empty"),
    ]
    found = [(problem.row, problem.reason) for problem in report.problems]
    assert [(row, reason[: len(expected[i][1])]) for i, (row, reason) in enumerate(found)] == (
        expected
    )
    assert report.rows == 23
    # All but the unknown (8), the unreadable (15, 16) and the missing (22); row 23 is math.
    assert report.by_category == {Category.CHART: 18, Category.MATH: 1}
    assert report.problems[0].id == "s2"
    assert report.problems[16].id is None


@pytest.mark.usefixtures("small_images_only")
def test_every_bad_row_of_parquet_is_told_with_its_number_across_files(tmp_path: Path) -> None:
    def cell(encoded: bytes | None, path: str | None = None) -> dict[str, Any]:
        return {"bytes": encoded, "path": path}

    (tmp_path / "real.png").write_bytes(png())
    rows = [
        line(1, image=cell(png(), "elsewhere/1.png")),
        line(2, image=cell(None, str(tmp_path / "real.png"))),
        line(3, image=cell(b"no image")),
        line(4, image=cell(TRUNCATED)),
        line(5, image=None),
        line(6, image=cell(png(size=(101, 100))), answer=None, category="poetry"),
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    pq.write_table(
        pa.Table.from_pylist([line(1, image=png()), line(8, image=png(), question="")]),
        tmp_path / "b.parquet",
    )
    pq.write_table(pa.Table.from_pylist([line(9, image=..., answer=3)]), tmp_path / "c.parquet")
    found = reasons(tmp_path)
    assert found[:2] == [
        (2, "image has no bytes, only a path, which is not opened; embed the images"),
        (3, "image is corrupt or in none of the formats PNG, JPEG, WEBP, GIF, BMP"),
    ]
    assert found[2][0] == 4 and found[2][1].startswith("image is corrupt (")
    assert found[3:] == [
        (5, "image is missing"),
        (6, "answer is missing"),
        (6, "category 'poetry' is unknown (known: perception, chart, math)"),
        (6, "image is too large: 101 x 100 pixels, more than 10000"),
        (7, "id 's1' is already used by row 1"),
        (8, "question is empty"),
        (9, "image is missing"),
        (9, "answer: Input should be a valid string"),
    ]
    assert validate(tmp_path).by_category == {Category.CHART: 8}


def test_an_image_outside_the_folder_is_never_opened(tmp_path: Path) -> None:
    # A pipe without a writer: opening it would hang.
    os.mkfifo(tmp_path / "pipe")
    folder = write_lines(tmp_path / "data", [line(1, image="../pipe"), line(2, image="link")])
    (folder / "link").symlink_to(tmp_path / "pipe")
    assert [row for row, _ in reasons(folder)] == [1, 2]


def test_opening_names_the_first_bad_row_and_the_command_that_lists_all(tmp_path: Path) -> None:
    folder = write_lines(tmp_path, [line(1), line(2, image="none.png"), line(3, answer="")])
    with pytest.raises(UserError) as caught:
        open_data(folder)
    assert caught.value.what == f"Row 2 of {folder}: image file 'none.png' is missing."
    assert f"srccore data validate {folder}" in caught.value.fix


def test_a_cut_off_image_opens_and_is_refused_when_it_is_decoded(tmp_path: Path) -> None:
    write_data(tmp_path / "d.parquet", [(sample(1), TRUNCATED)])
    data = open_data(tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"Sample 's1' of .*: image is corrupt"):
        data.image("s1")
    # Its header is whole.
    assert data.size("s1") == (64, 64)


def test_opening_a_data_set_decodes_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_lines(tmp_path, [line(1), line(2, image="turned.jpg")])
    turned = Image.Exif()
    turned[0x0112] = 8
    Image.new("RGB", (5, 2)).save(folder / "turned.jpg", exif=turned)

    def refuse(image: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    data = open_data(folder)
    assert (data.size("s1"), data.size("s2")) == ((4, 3), (2, 5))


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    # A PNG header that claims 60000 x 60000 pixels, 3.6e9, far above Pillow's own limit.
    bomb = bytearray(png())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    pq.write_table(pa.Table.from_pylist([line(1, image=bytes(bomb))]), tmp_path / "d.parquet")
    assert validate(tmp_path / "d.parquet").problems == (
        RowProblem(1, "s1", "image is too large: more than 40000000 pixels"),
    )
    with pytest.raises(UserError, match="image is too large"):
        open_data(tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"Sample 's1' cannot be written: image is too large"):
        write_data(tmp_path / "e.parquet", [(sample(1), bytes(bomb))])
    assert not (tmp_path / "e.parquet").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is not a data set"),
        (["samples.txt"], "is not a data set"),
        (["samples.jsonl", "a.parquet"], "contains both"),
        (["a.parquet"], "cannot be read"),
    ],
)
def test_a_folder_that_is_no_data_set_is_refused(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for name in files:
        (tmp_path / name).write_text("no data")
    for read in (open_data, validate):
        with pytest.raises(UserError, match=message):
            read(tmp_path)
        with pytest.raises(UserError, match="is not a data set"):
            read(tmp_path / "missing.parquet")


def test_a_data_set_without_rows_is_a_problem(tmp_path: Path) -> None:
    write_data(tmp_path / "empty.parquet", [])
    (tmp_path / "samples.jsonl").write_text("\n")
    for path in (tmp_path / "empty.parquet", tmp_path / "samples.jsonl"):
        with pytest.raises(UserError, match=rf"{path} has no rows"):
            validate(path)
        command = [sys.executable, "-m", "srccore", "data", "validate", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert (
            done.stderr
            == f"Error: The data set {path} has no rows. Check the path, or add samples.\n"
        )


def test_importing_the_module_loads_neither_pyarrow_nor_pillow() -> None:
    code = "import sys, srccore.data.dataset; print({'pyarrow', 'PIL', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_missing_image_in_a_rewritten_split_is_reported_with_its_row(tmp_path: Path) -> None:
    # As pandas writes it: the columns of a split, in one group that is too large to be read for
    # one image.
    write_data(tmp_path / "split.parquet", [(sample(1), png()), (sample(2), png())])
    rows = pq.read_table(tmp_path / "split.parquet").to_pylist()
    rows[0]["image"]["bytes"] = png() + bytes(9 * 2**20)
    rows[1]["image"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"Row \d of .*: image"):
        open_data(tmp_path / "d.parquet")
