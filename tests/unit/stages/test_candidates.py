"""What score-candidates rates, and what curate-preference makes of what it leaves out."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from PIL import Image

from srccore.config import CurationConfig, ScoringConfig
from srccore.data import dataset
from srccore.data.records import (
    REFERENCE,
    Candidate,
    CandidateSet,
    Category,
    Rating,
    Sample,
    Unrated,
    read_records,
    write_records,
)
from srccore.errors import UserError
from srccore.models.policy import resolve_model_path
from srccore.stages.candidates import score_candidates
from srccore.stages.preferences import curate_preference


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two samples with two candidates each; only the first sample has a reference rationale."""
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    samples = [
        Sample(
            id=name, category=Category.CHART, question="How many?", answer="2", rationale=rationale
        )
        for name, rationale in (("told", "There are 2."), ("untold", None))
    ]
    data = tmp_path / "data.parquet"
    dataset.write_data(data, [(sample, picture.getvalue()) for sample in samples])
    candidates = tmp_path / "candidates"
    candidates.mkdir()
    sets = [
        CandidateSet(
            sample_id=sample.id,
            candidates=tuple(
                Candidate(
                    id=f"{sample.id}-{number}",
                    text=f"I see {number}.\nAnswer: {number}",
                    log_probability=-1,
                    token_count=5,
                )
                for number in (2, 3)
            ),
        )
        for sample in samples
    ]
    write_records(candidates / "candidates.jsonl", CandidateSet, sets)
    scorer = tmp_path / "scorer"
    shutil.copytree(resolve_model_path("embedded:rating"), scorer / "model")
    return {"data": data, "candidates": candidates, "scorer": scorer}


def test_a_sample_without_a_reference_is_left_unrated_and_counted(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    rated = tmp_path / "rated"
    figures = score_candidates(ScoringConfig(), **folders, out=rated)
    assert (figures["samples"], figures["no_reference"], figures["ratings"]) == (1, 1, 6)
    ratings = list(read_records(rated / "ratings.jsonl", Rating))
    assert {rating.sample_id for rating in ratings} == {"told"}
    assert sum(REFERENCE in (rating.first, rating.second) for rating in ratings) == 4
    assert list(read_records(rated / "unrated.jsonl", Unrated)) == [Unrated(sample_id="untold")]
    given = {"data": folders["data"], "candidates": [folders["candidates"]]}
    config = CurationConfig(min_margin=0, anchor_tolerance=1)
    curated = curate_preference(config, **given, ratings=[rated], out=tmp_path / "curated")
    assert curated["reasons"]["no_reference"] == 1
    assert len(curated["anchors"]) == 1
    # Missing ratings are something else than missing references.
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy2(rated / "ratings.jsonl", own)
    with pytest.raises(UserError, match="ratings of sample untold do not cover"):
        curate_preference(config, **given, ratings=[own], out=tmp_path / "other")


def test_a_sample_without_a_reference_can_be_rated_by_its_answer_alone(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    rated = tmp_path / "rated"
    figures = score_candidates(ScoringConfig(require_reference=False), **folders, out=rated)
    # Two pairs of candidates in each sample, and four with the reference of the first.
    assert (figures["samples"], figures["no_reference"], figures["ratings"]) == (2, 1, 8)
    assert list(read_records(rated / "unrated.jsonl", Unrated)) == []
