"""Which pairs a teacher rates for R-Scorer to learn from."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from srccore.config import AnnotationConfig
from srccore.data import dataset
from srccore.data.records import (
    Candidate,
    CandidateSet,
    Category,
    Fact,
    LabelledPair,
    Sample,
    read_records,
    write_records,
)
from srccore.stages.scorer import annotate_ratings

REFERENCE = "The red bar is 2.\nAnswer: 2"
WRONG = ["The red bar is 3.\nAnswer: 3", "The red bar is 4.\nAnswer: 4"]


@pytest.mark.parametrize(
    ("sampled", "reference_pairs", "with_reference", "without"),
    [
        (WRONG, 2, 2, 1),
        (WRONG, 1, 1, 1),
        (WRONG, 0, 0, 1),
        # The policy wrote it itself: one of the two has its pair with the reference already.
        ([WRONG[0], "the red bar is 2\nAnswer: 2."], 2, 0, 1),
    ],
)
def test_responses_are_also_rated_against_the_reference_that_was_not_sampled(
    tmp_path: Path, sampled: list[str], reference_pairs: int, with_reference: int, without: int
) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    facts = (Fact(subject="the red bar", relation="is", value="2"),)
    sample = Sample(id="s", category=Category.CHART, question="How high?", answer="2", facts=facts)
    data = tmp_path / "data.parquet"
    dataset.write_data(data, [(sample, picture.getvalue())])
    found = tuple(
        Candidate(id=text, text=text, log_probability=-1, token_count=5) for text in sampled
    )
    write_records(
        tmp_path / "candidates.jsonl", CandidateSet, [CandidateSet(sample_id="s", candidates=found)]
    )
    config = AnnotationConfig(samples=1, reference_pairs=reference_pairs)
    annotate_ratings(config, data=data, candidates=tmp_path, out=tmp_path / "rated", seed=0)
    rated = list(read_records(tmp_path / "rated" / "labelled_pairs.jsonl", LabelledPair))
    anchored = [pair for pair in rated if REFERENCE in (pair.first, pair.second)]
    assert len(anchored) == with_reference
    assert len(rated) - len(anchored) == without
    # The teacher finds the reference much better.
    assert all(pair.rating == (5 if pair.first == REFERENCE else 1) for pair in anchored)
