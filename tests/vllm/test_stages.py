"""Stages whose engine is vLLM: whole, interrupted, and in a round of the loop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from local.shrunken import Recorder, shrunken

from srccore.config import RunConfig
from srccore.data.records import CandidateSet, read_records
from srccore.files import JOURNAL, write_json
from srccore.models.policy import Policy, write_policy
from srccore.run.folder import RunFolder
from srccore.run.loop import run
from srccore.stages.manifest import read_manifest
from srccore.stages.table import STAGES

pytestmark = pytest.mark.vllm
ON_VLLM = ("engine.name=vllm", "engine.sequences=64")


def finish(stage: str, config: RunConfig, out: Path, **given: Any) -> dict[str, Any]:
    return STAGES[stage].run(config, out=out, **given)


def test_a_killed_search_resumes_with_the_samples_that_were_finished(tmp_path: Path) -> None:
    config = shrunken(*ON_VLLM, "search.samples=20", "engine.sequences=16")
    finish("prepare-data", config, tmp_path / "data")
    write_policy(tmp_path / "policy.json", Policy(base=config.model))
    given = {
        "data": tmp_path / "data" / "calibration.parquet",
        "policy": tmp_path / "policy.json",
        "round_number": 1,
        "shard": (0, 1),
    }
    whole = finish("search-candidates", config, tmp_path / "whole", **given)
    assert whole["samples"] == 20

    write_json(RunFolder(tmp_path).config, config.model_dump(mode="json"))
    words = [sys.executable, __file__, str(tmp_path), str(tmp_path / "killed")]
    process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    journal = tmp_path / "killed" / JOURNAL
    try:
        deadline = time.monotonic() + 300
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = journal.read_bytes()
    assert 2 < kept.count(b"\n") < 20

    resumed = finish("search-candidates", config, tmp_path / "killed", **given)
    assert resumed["samples"] == 20
    assert read_manifest(tmp_path / "killed").work["prompts"] == 20 - kept.count(b"\n")
    found = {
        name: list(read_records(tmp_path / name / "candidates.jsonl", CandidateSet))
        for name in ("whole", "killed")
    }
    assert [each.sample_id for each in found["killed"]] == [
        each.sample_id for each in found["whole"]
    ]
    texts = {
        name: {(each.sample_id, c.text) for each in sets for c in each.candidates}
        for name, sets in found.items()
    }
    # Not all: with others beside it, a draw may meet a tie that rounding decides.
    assert len(texts["killed"] & texts["whole"]) > 0.9 * len(texts["whole"])


def test_a_round_with_either_engine_has_figures_within_their_intervals(tmp_path: Path) -> None:
    more = ("rationale.samples=100", "data.heldout=150", "search.samples=48", "data.train=160")
    figures = {}
    for name, settings in (("transformers", ()), ("vllm", ON_VLLM)):
        config = shrunken(*more, *settings)
        out = tmp_path / name
        figures[name] = run(config, out, Recorder())
        searched = read_manifest(RunFolder(out).output("search-candidates", 1, 0)).figures
        assert searched["samples"] == 48
        assert searched["fewer_than_two"] < 5
    for theirs, ours in zip(figures["transformers"], figures["vllm"], strict=True):
        for figure in ("accuracy", "aligned_accuracy", "format_rate"):
            low, high = theirs["interval"][figure]
            mine_low, mine_high = ours["interval"][figure]
            assert low <= mine_high, figure
            assert mine_low <= high, figure
    # Before any search, the same policy answers greedily.
    assert figures["vllm"][0]["accuracy"] == pytest.approx(
        figures["transformers"][0]["accuracy"], abs=0.02
    )


if __name__ == "__main__":
    from srccore.run.loop import load_run

    folder = Path(sys.argv[1])
    finish(
        "search-candidates",
        load_run(folder),
        Path(sys.argv[2]),
        data=folder / "data" / "calibration.parquet",
        policy=folder / "policy.json",
        round_number=1,
        shard=(0, 1),
    )
