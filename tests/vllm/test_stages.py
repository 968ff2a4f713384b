"""Stages whose engine is vLLM: whole, interrupted, and in a round of the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
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


def running_in(group: int) -> list[str]:
    """The processes of a group, by name; those that have ended may still have a number."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            is_running = process.status() != psutil.STATUS_ZOMBIE
            if os.getpgid(process.pid) == group and is_running:
                found.append(" ".join([process.name(), *process.cmdline()]))
    return found


@dataclasses.dataclass(frozen=True)
class Searched:
    """A finished search, and what another one needs."""

    folder: Path
    config: RunConfig

    @property
    def given(self) -> dict[str, Any]:
        return {
            "data": self.folder / "data" / "calibration.parquet",
            "policy": self.folder / "policy.json",
            "round_number": 1,
            "shard": (0, 1),
        }

    def texts(self, out: Path) -> set[tuple[str, str]]:
        """The candidates of a search, which has all samples, in their order."""
        found = list(read_records(out / "candidates.jsonl", CandidateSet))
        whole = read_records(self.folder / "whole" / "candidates.jsonl", CandidateSet)
        assert [each.sample_id for each in found] == [each.sample_id for each in whole]
        return {(each.sample_id, c.text) for each in found for c in each.candidates}

    def start(self, out: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Starts the search in a process of its own, and in a process group of its own."""
        words = [sys.executable, __file__, str(self.folder), str(out)]
        path = os.pathsep.join(sys.path)
        environment = {**os.environ, "PYTHONPATH": path, **environment}
        return subprocess.Popen(words, env=environment, start_new_session=True)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    config = shrunken(*ON_VLLM, "search.samples=20", "engine.sequences=16")
    found = Searched(tmp_path_factory.mktemp("searched"), config)
    finish("prepare-data", config, found.folder / "data")
    write_policy(found.given["policy"], Policy(base=config.model))
    write_json(RunFolder(found.folder).config, config.model_dump(mode="json"))
    whole = finish("search-candidates", config, found.folder / "whole", **found.given)
    assert whole["samples"] == 20
    return found


def test_an_engine_in_a_process_of_its_own_finds_the_same_and_ends(
    searched: Searched, tmp_path: Path
) -> None:
    out = tmp_path / "apart"
    process = searched.start(out, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert process.wait(300) == 0
    # vLLM's process is gone by now; Python's own tracker of resources ends after its parent.
    deadline = time.monotonic() + 30
    while left := running_in(process.pid):
        assert not any("EngineCore" in name for name in left)
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    found, expected = searched.texts(out), searched.texts(searched.folder / "whole")
    # Not all: with others beside it, a draw may meet a tie that rounding decides.
    assert len(found & expected) > 0.9 * len(expected)
    work = read_manifest(out).work
    assert work["prompts"] == work["image_encodings"] == 20


def test_a_killed_search_resumes_with_the_samples_that_were_finished(
    searched: Searched, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    process = searched.start(out)
    journal = out / JOURNAL
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

    resumed = finish("search-candidates", searched.config, out, **searched.given)
    assert resumed["samples"] == 20
    assert read_manifest(out).work["prompts"] == 20 - kept.count(b"\n")
    found, expected = searched.texts(out), searched.texts(searched.folder / "whole")
    assert len(found & expected) > 0.9 * len(expected)


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

    another = Searched(Path(sys.argv[1]), load_run(Path(sys.argv[1])))
    finish("search-candidates", another.config, Path(sys.argv[2]), **another.given)
