from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from srccore.data import dataset
from srccore.data.dataset import (
    DataSet,
    RowProblem,
    open_data,
    validate,
    write_data,
)
from srccore.data.records import Category, Fact, Sample
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


@pytest.fixture
def small_images_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MAX_IMAGE_PIXELS", 10_000)


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
    assert data.samples == tuple(samples)
    assert len(data) == 2
    assert data.sample("s2") == samples[1]
    assert data.encoded("s2") == png("blue")
    image = data.image("s2")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 3), (0, 0, 255))
    assert list(tmp_path.iterdir()) == [path]


def test_a_data_set_with_facts_is_read_from_json_lines(tmp_path: Path) -> None:
    fact = {"subject": "the bar", "relation": "is", "value": "3"}
    folder = write_lines(tmp_path, [line(1, facts=[fact], rationale=None), "", line(2)])
    expected = (sample(1, facts=(Fact(**fact),)), sample(2))
    for path in (folder, folder / "samples.jsonl"):
        data = open_data(path)
        assert data.samples == expected
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
    assert theirs.samples == (sample(1, facts=(fact,)), sample(2))
    assert theirs.image("s2").getpixel((0, 0)) == (255, 0, 0)


def test_a_folder_of_parquet_files_is_one_data_set_in_the_order_of_their_names(
    tmp_path: Path,
) -> None:
    write_data(tmp_path / "b.parquet", [(sample(3), png("blue"))])
    write_data(tmp_path / "a.parquet", [(sample(n), png()) for n in (1, 2)])
    data = open_data(tmp_path)
    assert [s.id for s in data.samples] == ["s1", "s2", "s3"]
    assert data.image("s3").getpixel((0, 0)) == (0, 0, 255)


def test_images_are_found_across_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    rows = ((sample(n), png(size=(1 + n % 7, 1 + n // 7))) for n in range(600))
    assert write_data(path, rows) == 600
    assert pq.read_metadata(path).num_row_groups == 3  # 256 + 256 + 88
    data = open_data(path)
    for number in (0, 599, 255, 256, 1):
        assert data.image(f"s{number}").size == (1 + number % 7, 1 + number // 7)


def test_a_plain_binary_image_column_and_absent_optional_columns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist([line(1, image=png())]), path)
    data = open_data(path)
    assert data.samples == (sample(1),)
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
    assert open_data(path).samples == (sample(1),)
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_sample_is_told(tmp_path: Path) -> None:
    write_data(tmp_path / "d.parquet", [(sample(n), png(size=(n, 1))) for n in (1, 3)])
    data = open_data(tmp_path / "d.parquet")
    assert data.image("s3").size == (3, 1)
    for ask in (data.sample, data.image, data.encoded):
        with pytest.raises(UserError, match="no sample 's2'"):
            ask("s2")


def test_the_hash_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    def hash_of(data: DataSet) -> str:
        assert len(data.sha256) == 64
        return data.sha256

    first = open_data(write_lines(tmp_path / "one", [line(1), line(2)]))
    second = open_data(write_lines(tmp_path / "two", [line(1), line(2)]))
    assert hash_of(first) == hash_of(second)
    (tmp_path / "two" / "good.png").write_bytes(png("blue"))
    assert hash_of(open_data(tmp_path / "two")) != hash_of(first)
    write_data(tmp_path / "a.parquet", [(sample(1), png())])
    write_data(tmp_path / "b.parquet", [(sample(1), png())])
    assert hash_of(open_data(tmp_path / "a.parquet")) == hash_of(open_data(tmp_path / "b.parquet"))


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
    write_data(tmp_path / "d.parquet", [(sample(1), bytes(bomb))])
    assert validate(tmp_path / "d.parquet").problems == (
        RowProblem(1, "s1", "image is too large: more than 40000000 pixels"),
    )
    with pytest.raises(UserError, match="image is too large"):
        open_data(tmp_path / "d.parquet")


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
