"""Stage 1 on a few samples, and the stage that samples responses of its policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models

from srccore.config import (
    AnnotationConfig,
    DataConfig,
    LoraSettings,
    ModelConfig,
    RationaleTuningConfig,
    SearchConfig,
)
from srccore.data.dataset import open_data
from srccore.data.records import CandidateSet, Response, read_records
from srccore.errors import UserError
from srccore.models.policy import Policy, write_policy
from srccore.stages.candidates import sample_responses
from srccore.stages.data import prepare_data
from srccore.stages.format_check import format_rate
from srccore.stages.rationales import trained_on, tune_rationale
from srccore.training.machine import Figures, Machine

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


def tuning(min_format_rate: float = 0) -> RationaleTuningConfig:
    return RationaleTuningConfig(
        samples=4,
        learning_rate=1e-3,
        batch_size=4,
        min_format_rate=min_format_rate,
        lora=LoraSettings(rank=2, alpha=4),
    )


def test_a_policy_that_did_not_learn_the_format_is_refused_and_not_trained_again(
    data: Path, tmp_path: Path
) -> None:
    # The weights are random, and one step does not teach them anything.
    model = tiny_models.checkpoint("embedded", tmp_path / "model")
    out = tmp_path / "out"
    steps: list[int] = []
    machine = Machine(progress=lambda done, total, tokens=0: steps.append(done))

    def tune(min_format_rate: float) -> Figures:
        config = tuning(min_format_rate)
        return tune_rationale(config, model=model, data=data, out=out, seed=0, machine=machine)

    with pytest.raises(
        UserError, match=r"Stage 1 did not take: 0% of 8 responses .* train-\d+"
    ) as e:
        tune(0.8)
    assert "--set rationale.min_format_rate=0:" in str(e.value)
    assert steps == [1]
    assert not (out / "policy.json").exists()
    figures = tune(0)
    assert steps == [1]
    assert (figures["format_rate"], figures["steps"]) == (0, 1)
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock",
        "adapter",
        "manifest.json",
        "policy.json",
        "stage.json",
    ]


@pytest.mark.parametrize(
    ("text", "finished", "rate"),
    [
        ("The bar is high.\nAnswer: 3", True, 1),
        ("The bar is high.\nAnswer: 3", False, 0),
        ("Answer: 3", True, 0),
        ("The bar is high.", True, 0),
    ],
)
def test_a_response_has_the_format_if_it_ends_with_a_rationale_and_an_answer(
    text: str, finished: bool, rate: float
) -> None:
    said = Response(sample_id="1", text=text, token_count=9, finished=finished)
    assert format_rate([said]) == rate


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
    unseen = {sample.id for sample in open_data(data)} - seen
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
