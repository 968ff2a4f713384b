"""Which rationales a stage reads."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from srccore.data import dataset
from srccore.data.records import Category, Rationale, Sample, write_records
from srccore.errors import UserError
from srccore.stages.rationales import judged_samples


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
    judged = judged_samples(data, tmp_path, ["own", "taught", "failed"])
    assert {name: sample.rationale for name, sample in judged.items()} == {
        "own": "So it is.",
        "taught": "The teacher says so.",
        "failed": None,
    }
    with pytest.raises(UserError, match="no sample 'other'"):
        judged_samples(data, tmp_path, ["other"])
