"""Stages and a run whose samples are divided among several processes."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from shrunken import Recorder, shrunken

from srccore.data.dataset import open_data
from srccore.errors import UserError
from srccore.run.loop import run
from srccore.stages.candidates import score_candidates, search_candidates
from srccore.stages.evaluation import evaluate
from srccore.stages.manifest import read_manifest
from srccore.training.machine import Figures, Machine, Progress

# 24 samples each, of some 50 tokens: about five batches.
CONFIG = shrunken("search.batch_tokens=260", "evaluation.batch_tokens=260")


def search(run: Path, out: Path, machine: Machine) -> Figures:
    data = run / "data" / "calibration.parquet"
    given: dict[str, Any] = {"data": data, "policy": run / "tune-rationale", "round_number": 1}
    return search_candidates(CONFIG.search, out=out, seed=0, machine=machine, **given)


def score(run: Path, out: Path, machine: Machine) -> Figures:
    data, round_ = run / "data" / "calibration.parquet", run / "round-1"
    given = {"candidates": round_ / "search-candidates-0", "scorer": run / "train-scorer"}
    return score_candidates(CONFIG.scoring, data=data, out=out, machine=machine, **given)


def answer(run: Path, out: Path, machine: Machine) -> Figures:
    data = run / "data" / "heldout.parquet"
    given: dict[str, Any] = {"data": data, "policy": run / "tune-rationale", "round_number": 0}
    return evaluate(CONFIG.evaluation, out=out, seed=0, machine=machine, **given)


@pytest.mark.parametrize("workers", [(), (0, 1)])
def test_a_damaged_image_is_an_error_of_the_user_in_any_process(
    workers: tuple[int, ...], finished: Path, tmp_path: Path
) -> None:
    opened = open_data(finished / "data" / "calibration.parquet")
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "samples.jsonl").open("w") as rows:
        for sample in list(opened)[:6]:
            (tmp_path / "data" / f"{sample.id}.png").write_text("no image")
            row = sample.model_dump(mode="json", exclude_none=True) | {"image": f"{sample.id}.png"}
            rows.write(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="Row 1 of"):
        search_candidates(
            CONFIG.search,
            data=tmp_path / "data",
            policy=finished / "tune-rationale",
            out=tmp_path / "out",
            seed=0,
            round_number=1,
            machine=Machine("cpu", workers=workers),
        )


def outputs(folder: Path) -> dict[str, bytes]:
    files = folder.glob("*.json*")
    return {file.name: file.read_bytes() for file in files if file.name != "manifest.json"}


@pytest.mark.parametrize("stage", [search, score, answer])
def test_two_workers_write_what_one_process_writes(
    stage: Callable[[Path, Path, Machine], Figures],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("srccore.stages.candidates.SCORING_CHUNK", 5)
    alone = stage(finished, tmp_path / "alone", Machine("cpu"))
    progress: list[tuple[int, int]] = []
    counted: list[int] = []

    def cut(done: int, total: int, tokens: int = 0) -> None:
        progress.append((done, total))
        counted.append(tokens)
        if len(progress) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(finished, tmp_path / "two", Machine("cpu", cut, workers=(0, 1)))
    assert stage(finished, tmp_path / "two", Machine("cpu", cut, workers=(0, 1))) == alone
    assert outputs(tmp_path / "two") == outputs(tmp_path / "alone")
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    # The second attempt counts from the start; every batch adds tokens.
    for attempt in (counted[:2], counted[2:]):
        assert all(0 < less < more for less, more in itertools.pairwise(attempt))
    # In another folder without an interruption, for the work of all batches.
    stage(finished, tmp_path / "whole", Machine("cpu", workers=(0, 1)))
    found, expected = (read_manifest(tmp_path / name).work for name in ("whole", "alone"))
    assert found == expected


def test_a_run_with_two_workers_ends_with_the_same_figures_and_preferences(
    finished: Path, tmp_path: Path
) -> None:
    observer = Recorder()
    figures = run(shrunken(), tmp_path / "run", observer, workers=2)
    assert figures == json.loads((finished / "figures.json").read_text())
    for name in ("figures.json", "round-1/curate-preference/preferences.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()
    again = Recorder()
    assert run(shrunken(), tmp_path / "run", again, workers=3) == figures
    assert again.worked == []


class _Beside(Recorder):
    """An observer of a training that fails in the middle of the evaluation beside it."""

    def __init__(self, failure: BaseException) -> None:
        super().__init__()
        self.failure = failure
        self.evaluating = threading.Event()

    @contextmanager
    def stage(self, name: str, round_number: int | None) -> Iterator[Progress]:
        """Fails the training once the evaluation has made progress."""
        if name == "train-scorer":
            assert self.evaluating.wait(120)
            raise self.failure
        yield self._report if name == "evaluate" else lambda done, total, tokens=0: None

    def _report(self, done: int, total: int, tokens: int = 0) -> None:
        assert done < 24, "the evaluation was not stopped"
        self.evaluating.set()


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), ZeroDivisionError(), UserError("Bad.", "Fix it.")]
)
def test_a_failed_training_does_not_wait_for_the_evaluation_beside_it(
    failure: BaseException, finished: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    for folder in ("round-0", "round-1"):
        shutil.rmtree(copy / folder / "evaluate")
    config = json.loads((copy / "run.json").read_text())
    # So that there is a middle.
    config["evaluation"]["batch_tokens"] = 1
    (copy / "run.json").write_text(json.dumps(config))
    with pytest.raises(type(failure)) as caught:
        run(shrunken("evaluation.batch_tokens=1"), copy, _Beside(failure), workers=2)
    assert caught.value is failure
    assert (copy / "round-0" / "evaluate" / "journal.jsonl").exists()
    assert not (copy / "round-0" / "evaluate" / "manifest.json").exists()


def test_a_round_has_its_figures_where_the_next_one_fails(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "round-1" / "evaluate")
    (copy / "figures.json").unlink()
    blocked = copy / "round-2" / "search-candidates-0"
    blocked.mkdir(parents=True)
    (blocked / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="search-candidates-0 already holds"):
        run(shrunken("rounds=2"), copy, Recorder(), workers=2)
    assert (copy / "figures.json").read_bytes() == (finished / "figures.json").read_bytes()
