"""Stage 1 on a few samples, and the stage that samples responses of its policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from srccore.config import (
    AnnotationConfig,
    DataConfig,
    LoraSettings,
    ModelConfig,
    RationaleTuningConfig,
    SearchConfig,
)
from srccore.data.dataset import open_data
from srccore.data.records import CandidateSet, read_records
from srccore.models.policy import Policy, write_policy
from srccore.stages.candidates import sample_responses
from srccore.stages.data import prepare_data
from srccore.stages.rationales import trained_on, tune_rationale

MODEL = ModelConfig(path="embedded:lvlm")
SEARCH = SearchConfig(samples=4, max_sentences=2, max_sentence_tokens=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The train split: 12 samples."""
    out = tmp_path_factory.mktemp("data")
    prepare_data(DataConfig(train=12, calibration=4, heldout=4), out)
    return out / "train.parquet"


@pytest.fixture(scope="module")
def tuned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of stage 1, trained on 4 samples."""
    out = tmp_path_factory.mktemp("tuned")
    tune_rationale(tuning(), model=MODEL, data=data, out=out, seed=0)
    return out


def tuning(samples: int = 4) -> RationaleTuningConfig:
    return RationaleTuningConfig(
        samples=samples, learning_rate=1e-3, batch_size=4, lora=LoraSettings(rank=2, alpha=4)
    )


def sampled(data: Path, policy: Path, out: Path, samples: int) -> tuple[set[str], int]:
    """The samples whose responses are sampled, and how many the policy was trained on."""
    annotation = AnnotationConfig(samples=samples, candidates=2)
    figures = sample_responses(
        SEARCH, annotation=annotation, data=data, policy=policy, out=out, seed=0
    )
    found = [each.sample_id for each in read_records(out / "candidates.jsonl", CandidateSet)]
    assert len(set(found)) == len(found) == samples
    return set(found), figures["trained_on"]


def test_responses_are_sampled_for_samples_that_stage_1_has_not_used(
    data: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = trained_on(tuned / "policy.json")
    assert len(seen) == 4
    unseen = {sample.id for sample in open_data(data).samples} - seen
    assert sampled(data, tuned / "policy.json", tmp_path / "all", 8) == (unseen, 0)
    assert capsys.readouterr().err == ""
    found, again = sampled(data, tuned / "policy.json", tmp_path / "more", 10)
    assert (found > unseen, again) == (True, 2)
    assert "Only 8 of 10 samples are new to the policy" in capsys.readouterr().err


def test_all_samples_are_new_to_a_policy_from_elsewhere(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_policy(tmp_path / "policy.json", Policy(base=MODEL))
    found, again = sampled(data, tmp_path / "policy.json", tmp_path / "out", 12)
    assert (len(found), again) == (12, 0)
    assert capsys.readouterr().err == ""
