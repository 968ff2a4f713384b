"""An interrupted evaluation answers only the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from srccore.config import DataConfig, EvaluationConfig, ModelConfig
from srccore.models.policy import Policy, write_policy
from srccore.stages.data import prepare_data
from srccore.stages.evaluation import evaluate
from srccore.training.machine import Machine

COUNT, BATCH = 12, 4


def test_an_interrupted_evaluation_keeps_the_batches_that_it_has(tmp_path: Path) -> None:
    prepare_data(DataConfig(train=4, calibration=4, heldout=COUNT), tmp_path / "data")
    write_policy(tmp_path / "policy.json", Policy(base=ModelConfig(path="embedded:lvlm")))
    seen: list[int] = []

    def evaluated(folder: str, stop_at: int | None = None) -> Path:
        def progress(done: int, total: int) -> None:
            seen.append(done)
            if done == stop_at:
                raise KeyboardInterrupt

        evaluate(
            EvaluationConfig(batch_size=BATCH, max_tokens=60),
            data=tmp_path / "data" / "heldout.parquet",
            policy=tmp_path / "policy.json",
            out=tmp_path / folder,
            seed=0,
            round_number=0,
            machine=Machine("cpu", progress=progress),
        )
        return tmp_path / folder

    with pytest.raises(KeyboardInterrupt):
        evaluated("interrupted", stop_at=2 * BATCH)
    resumed = evaluated("interrupted")
    assert seen == [4, 8, 12]
    whole = evaluated("whole")
    for name in ("responses.jsonl", "figures.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    assert not (resumed / "journal.jsonl").exists()
