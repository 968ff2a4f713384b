"""An interrupted evaluation answers only the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from srccore.config import DataConfig, EvaluationConfig, ModelConfig
from srccore.models.policy import Policy, write_policy
from srccore.stages.data import prepare_data
from srccore.stages.evaluation import evaluate
from srccore.training.machine import Machine

COUNT = 12


def test_an_interrupted_evaluation_gives_the_engine_the_same_batches(tmp_path: Path) -> None:
    prepare_data(DataConfig(train=4, calibration=4, heldout=COUNT), tmp_path / "data")
    write_policy(tmp_path / "policy.json", Policy(base=ModelConfig(path="embedded:lvlm")))
    seen: list[int] = []

    def evaluated(folder: str, stop_after: int | None = None) -> Path:
        seen.clear()

        def progress(done: int, total: int, tokens: int = 0) -> None:
            seen.append(done)
            if len(seen) == stop_after:
                raise KeyboardInterrupt

        evaluate(
            # Of some 50 tokens each.
            EvaluationConfig(batch_tokens=220, max_tokens=60),
            data=tmp_path / "data" / "heldout.parquet",
            policy=tmp_path / "policy.json",
            out=tmp_path / folder,
            seed=0,
            round_number=0,
            machine=Machine("cpu", progress=progress),
        )
        return tmp_path / folder

    whole = evaluated("whole")
    batches = list(seen)
    assert len(batches) >= 3
    with pytest.raises(KeyboardInterrupt):
        evaluated("interrupted", stop_after=2)
    # As if the process had been killed while it wrote the second batch.
    journal = tmp_path / "interrupted" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert batches[0] < batches[1] - 1
    journal.write_text("".join(lines[: batches[1] - 1]) + lines[-1][:20])
    resumed = evaluated("interrupted")
    assert len(seen) == len(batches) - 1
    for name in ("responses.jsonl", "figures.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    assert not (resumed / "journal.jsonl").exists()
