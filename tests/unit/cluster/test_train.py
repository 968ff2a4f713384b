"""What the step of a training job refuses before there is a job, for every stage that trains."""

from __future__ import annotations

from typing import Any

import pytest

from srccore.cluster.train import train
from srccore.config import load_config
from srccore.stages.table import STAGES

ROOT = "s3://bucket/root"
STAGES_THAT_TRAIN = [name for name, stage in STAGES.items() if stage.trains]
EACH = pytest.mark.parametrize("stage", STAGES_THAT_TRAIN)


def refused(
    capsys: pytest.CaptureFixture[str],
    stage: str,
    *overrides: str,
    root: str = ROOT,
    launcher: str = "pytorchjob",
    model: dict[str, Any] | None = None,
    **job: Any,
) -> str:
    """What the step of a stage says, with the settings of `tiny`."""
    config = load_config("tiny", overrides)
    settings = {
        name: getattr(config, section).model_dump(mode="json", exclude_none=True)
        for name, section in STAGES[stage].sections.items()
    }
    with pytest.raises(SystemExit) as stopped:
        train(
            stage,
            root,
            launcher=launcher,
            inputs={},
            settings={**settings, **({"model": model} if model else {})},
            job={"image": "any", **job},
        )
    assert stopped.value.code == 2
    (paragraph,) = capsys.readouterr().err.strip().splitlines()
    assert paragraph.startswith("Error: ")
    return paragraph


@EACH
def test_a_job_without_a_bucket_is_refused(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Pass an artifact root in a bucket" in refused(capsys, stage, root="/disk")


@EACH
def test_a_launcher_that_does_not_exist_is_refused(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "Unknown launcher 'mpi'. Choose one of inprocess, pytorchjob, trainjob."
    assert told in refused(capsys, stage, launcher="mpi")


@EACH
def test_a_batch_that_the_processes_cannot_share_is_refused(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # 8 samples in stage 1 and DPO, 32 in R-Scorer's training, and 3 divides none of them.
    told = refused(capsys, stage, pods=3, gpus=1)
    assert "cannot be split evenly among 3 processes" in told
    section = STAGES[stage].sections["config"]
    told = refused(capsys, stage, f"{section}.batch_size=5", pods=2, gpus=2)
    assert "A batch of 5 (batch_size)" in told and "4 processes" in told


@pytest.mark.parametrize(("stage", "pods"), [("train-scorer", 32), ("tune-rationale", 8)])
def test_a_batch_that_the_processes_can_share_is_not_what_is_refused(
    stage: str, pods: int, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, stage, model={"path": "/disk"}, pods=pods)
    assert "is /disk, which a job's pods cannot access" in told


@EACH
@pytest.mark.parametrize(
    ("launcher", "job", "told"),
    [
        ("pytorchjob", {"pods": 0}, "Invalid job of {}: pods must be at least 1, got 0"),
        ("trainjob", {"priority_class": "p"}, "The parameter job of {} sets priority_class"),
    ],
)
def test_a_wrong_job_is_refused_with_its_stage(
    stage: str, launcher: str, job: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told.format(stage) in refused(capsys, stage, launcher=launcher, **job)
