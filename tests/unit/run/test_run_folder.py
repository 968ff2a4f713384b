"""The layout of a run folder, over empty files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from holding import held_by_another

from srccore.config import load_config
from srccore.errors import UserError
from srccore.run.folder import RunFolder
from srccore.run.loop import _open_run, load_run
from srccore.run.report.gather import collect


def finish(*folders: Path) -> None:
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()


def keep(run: RunFolder, number: int, kept: bool) -> None:
    run.kept(number).write_text(json.dumps({"aligned": kept, "change": {}}))


def test_every_stage_has_its_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    found = {
        run.config: "run.json",
        run.figures: "figures.json",
        run.report: "report.html",
        run.split("train"): "data/train.parquet",
        run.rationales("train"): "augment-rationales/train",
        run.output("tune-rationale"): "tune-rationale",
        run.output("sample-responses"): "sample-responses",
        run.output("annotate-ratings"): "annotate-ratings",
        run.output("train-scorer"): "train-scorer",
        run.output("search-candidates", 2, 7): "round-2/search-candidates-7",
        run.output("score-candidates", 2, 7): "round-2/score-candidates-7",
        run.output("curate-preference", 2): "round-2/curate-preference",
        run.output("train-dpo", 2): "round-2/train-dpo",
        run.check(2, "before"): "round-2/check-before",
        run.kept(2): "round-2/kept.json",
        run.output("evaluate", 0): "round-0/evaluate",
        run.trained_policy(0): "tune-rationale/policy.json",
        run.trained_policy(2): "round-2/train-dpo/policy.json",
    }
    assert {path.relative_to(tmp_path).as_posix() for path in found} == set(found.values())
    assert all(path == tmp_path / place for path, place in found.items())


def test_the_round_of_an_output_is_that_of_its_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "round-9")
    assert run.round_of(run.output("search-candidates", 12, 0)) == 12
    assert run.round_of(run.output("evaluate", 0)) == 0
    assert run.round_of(run.rationales("train")) is None
    assert run.round_of(run.data) is None


def test_finished_rounds_are_those_that_were_evaluated(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.finished_rounds() == []
    finish(
        run.output("evaluate", 10),
        run.output("evaluate", 2),
        run.output("evaluate", 0),
        run.output("train-dpo", 3),
    )
    finish(run.check(4, "after"))
    assert run.finished_rounds() == [0, 2, 10]


def test_only_finished_ratings_are_read(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    finish(
        run.output("score-candidates", 1, 0),
        run.output("score-candidates", 1, 1),
        run.output("search-candidates", 1, 2),
    )
    run.output("score-candidates", 1, 2).mkdir()
    assert run.all_ratings(1) == [
        run.output("score-candidates", 1, 0),
        run.output("score-candidates", 1, 1),
    ]


def test_a_round_whose_training_was_not_kept_has_the_policy_before_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    finish(*(run.output("evaluate", number) for number in range(4)))
    keep(run, 2, kept=True)
    keep(run, 3, kept=False)
    assert run.policy(3) == run.policy(2) == run.trained_policy(2)
    keep(run, 2, kept=False)
    keep(run, 1, kept=False)
    assert run.policy(3) == run.policy(0) == tmp_path / "tune-rationale" / "policy.json"
    with pytest.raises(UserError, match=r"has not finished round 4\. Finished rounds: 0, 1, 2, 3"):
        run.policy(4)


def test_a_training_in_progress_does_not_keep_a_run_from_its_report(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.config.write_text(load_config("tiny").model_dump_json())
    for training in (run.output("tune-rationale"), run.output("train-dpo", 1)):
        checkpoint = training / "checkpoint" / "step-4"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text('{"step": 4}')
    assert run.finished_stages() == []
    data = collect(tmp_path)
    assert (data.finished, data.stages, data.rounds) == (False, (), ())


@pytest.mark.parametrize("content", [b"", b"3", b"{}", b"\xff", b"[" * 100_000])
def test_a_damaged_file_of_a_run_is_explained(tmp_path: Path, content: bytes) -> None:
    run = RunFolder(tmp_path)
    run.round(1).mkdir()
    for path in (run.figures, run.kept(1), run.config):
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"its run\.json is missing or unreadable"):
        load_run(tmp_path)
    with pytest.raises(UserError, match=r"figures\.json cannot be read or is damaged"):
        run.known_figures()
    with pytest.raises(UserError, match=r"kept\.json cannot be read or is damaged"):
        run.is_kept(1)


def test_a_run_that_another_process_works_on_is_refused_untouched(tmp_path: Path) -> None:
    config = load_config("tiny")
    held = _open_run(config, RunFolder(tmp_path))
    del held
    before = (tmp_path / "run.json").stat().st_mtime_ns
    with (
        held_by_another(tmp_path),
        pytest.raises(UserError, match=f"Another process is working on {tmp_path}.*--out"),
    ):
        _open_run(config, RunFolder(tmp_path))
    assert (tmp_path / "run.json").stat().st_mtime_ns == before
    _open_run(config, RunFolder(tmp_path))


def test_a_run_that_was_killed_at_its_first_file_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "run.json.0123abcd.tmp").write_text("{", encoding="utf-8")
    config = load_config("tiny")
    _open_run(config, RunFolder(tmp_path))
    assert load_run(tmp_path) == config
    assert not list(tmp_path.glob("*.tmp"))
