"""What the stages share: what an unfinished one keeps, and what R-Scorer judges against."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from srccore.data import dataset
from srccore.data.records import Category, Rationale, Sample, write_records
from srccore.errors import UserError
from srccore.stages import _Journal, _judged_samples

# Separators that end a line for some readers, and a letter of two bytes.
TEXTS = ("a\u2028b", "c\u0085d", "é")
RECORDS = [Rationale(sample_id=f"s{number}", rationale=text) for number, text in enumerate(TEXTS)]


def test_any_text_comes_back_as_it_was(tmp_path: Path) -> None:
    journal = _Journal(tmp_path, Rationale)
    journal.append(*RECORDS)
    assert journal.records() == RECORDS


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_record_that_an_interruption_cut_is_not_there_and_the_next_one_follows(
    tmp_path: Path, cut: int
) -> None:
    journal = _Journal(tmp_path, Rationale)
    journal.append(*RECORDS)
    # Among the cuts are such within the letter of two bytes.
    journal.path.write_bytes(journal.path.read_bytes()[:-cut])
    assert journal.records() == RECORDS[:2]
    journal.append(RECORDS[2])
    assert journal.records() == RECORDS


def test_r_scorer_judges_against_the_rationale_of_the_data_or_else_the_teachers(
    tmp_path: Path,
) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    samples = [
        Sample(
            id=name, category=Category.CHART, question="How many?", answer="2", rationale=rationale
        )
        for name, rationale in (("own", "So it is."), ("taught", None), ("failed", None))
    ]
    data = tmp_path / "data.parquet"
    dataset.write_data(data, [(sample, picture.getvalue()) for sample in samples])
    taught = [
        Rationale(sample_id=name, rationale="The teacher says so.") for name in ("own", "taught")
    ]
    write_records(tmp_path / "rationales.jsonl", Rationale, taught)
    judged = _judged_samples(data, tmp_path, ["own", "taught", "failed"])
    assert {name: sample.rationale for name, sample in judged.items()} == {
        "own": "So it is.",
        "taught": "The teacher says so.",
        "failed": None,
    }
    with pytest.raises(UserError, match="no sample 'other'"):
        _judged_samples(data, tmp_path, ["other"])
