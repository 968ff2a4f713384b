"""prepare-data on your own data set."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from srccore.config import DataConfig
from srccore.data import parquet
from srccore.data.dataset import open_data
from srccore.data.records import Category
from srccore.errors import UserError
from srccore.stages.data import SPLITS, prepare_data

PIXEL = io.BytesIO()
Image.new("RGB", (3, 2)).save(PIXEL, "PNG")


def row(number: int, image: object) -> dict[str, object]:
    category = list(Category)[number % 3]
    return {
        "id": f"s{number}",
        "category": category,
        "question": "?",
        "answer": "2",
        "image": image,
    }


def own_data(path: Path, count: int = 64, size: int = 100_000) -> list[bytes]:
    """Writes rows of different images in groups of 32, as other tools write them."""
    images = [PIXEL.getvalue() + os.urandom(size) for _ in range(count)]
    table = pa.Table.from_pylist([row(n, image) for n, image in enumerate(images)])
    pq.write_table(table, path, row_group_size=32)
    return images


def settings(source: Path, each: int = 16) -> DataConfig:
    return DataConfig(source=str(source), train=each, calibration=each, heldout=each)


def test_the_splits_share_no_sample_and_have_its_image_each(tmp_path: Path) -> None:
    images = own_data(tmp_path / "own.parquet", size=10)
    figures = prepare_data(settings(tmp_path / "own.parquet"), tmp_path / "out")
    seen: set[str] = set()
    for split in SPLITS:
        data = open_data(tmp_path / "out" / f"{split}.parquet")
        assert figures["samples"][split] == len(data) > 0
        assert seen.isdisjoint(sample.id for sample in data)
        seen |= {sample.id for sample in data}
        assert all(data.encoded(s.id) == images[int(s.id[1:])] for s in data)


def test_what_is_prepared_does_not_depend_on_the_format_of_the_source(tmp_path: Path) -> None:
    images = own_data(tmp_path / "own.parquet", size=10)
    lines = tmp_path / "lines"
    lines.mkdir()
    for number, image in enumerate(images):
        (lines / f"{number}.png").write_bytes(image)
    texts = [json.dumps(row(number, f"{number}.png")) for number in range(len(images))]
    (lines / "samples.jsonl").write_text("\n".join(texts))
    for name, source in (("a", tmp_path / "own.parquet"), ("b", lines)):
        prepare_data(settings(source), tmp_path / name)
    for split in SPLITS:
        first, second = (tmp_path / name / f"{split}.parquet" for name in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()


def test_each_image_of_the_source_is_read_once(tmp_path: Path) -> None:
    source = tmp_path / "own.parquet"
    own_data(source, size=10)
    prepare_data(settings(source), tmp_path / "first")  # imports
    own_data(source)
    before = Path("/proc/self/io").read_text().split()[1]
    prepare_data(settings(source, 20), tmp_path / "out")
    read = int(Path("/proc/self/io").read_text().split()[1]) - int(before)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.parquet"))
    # Once to identify the source and once to copy it; then the splits, for the index as they are
    # written and for the manifest.
    assert read < 1.1 * (2 * source.stat().st_size + 2 * written)


def test_a_bad_row_is_reported_with_its_number_and_nothing_is_left(tmp_path: Path) -> None:
    source = tmp_path / "own.parquet"
    rows = [row(n, PIXEL.getvalue()) for n in range(30)]
    rows[20]["image"] = b"no image"
    pq.write_table(pa.Table.from_pylist(rows), source)
    with pytest.raises(UserError, match=rf"Row 21 of {source}: image is corrupt or in none of"):
        prepare_data(settings(source, 4), tmp_path / "out")
    assert {each.name for each in (tmp_path / "out").iterdir()} == {".lock", "stage.json"}
    rows[20]["image"] = PIXEL.getvalue()
    rows[5]["answer"] = " "
    pq.write_table(pa.Table.from_pylist(rows), source)
    with pytest.raises(UserError, match=rf"Row 6 of {source}: answer is empty"):
        prepare_data(settings(source, 4), tmp_path / "other")


def test_a_split_that_was_prepared_is_a_source_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 1_000)
    own_data(tmp_path / "own.parquet", 120, size=100)
    prepare_data(settings(tmp_path / "own.parquet", 40), tmp_path / "out")
    # Another seed: by the same hash, all of its samples belong to the train split.
    config = settings(tmp_path / "out" / "train.parquet", 4).model_copy(update={"seed": 1})
    again = prepare_data(config, tmp_path / "again")
    assert sum(again["samples"].values()) > 0
