"""Where the loop does the work of a stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from srccore.config import load_config
from srccore.run.console import ConsoleObserver
from srccore.run.folder import RunFolder
from srccore.run.loop import _Wiring


def wiring(*settings: str, workers: tuple[int, ...] = (), processes: int | None = None) -> _Wiring:
    config, folder = load_config("tiny", settings), RunFolder(Path())
    return _Wiring(config, folder, ConsoleObserver(), workers, processes)


def test_a_stage_on_vllm_has_a_process_of_its_own_also_on_one_gpu() -> None:
    mixed = wiring("search.engine.name=vllm")
    assert mixed.divided("search-candidates", ()) == (0,)
    assert mixed.divided("sample-responses", (0, 1)) == (0, 1)
    assert mixed.divided("score-candidates", ()) == ()
    assert mixed.divided("evaluate", (1,)) == (1,)
    assert mixed.divided("train-dpo", (0, 1)) == ()


@pytest.mark.parametrize(
    ("gpus", "processes", "is_beside"),
    [("", None, True), ("", 1, True), ("", 2, False), ("0", None, False), ("0,1", None, False)],
)
def test_an_evaluation_runs_beside_a_training_that_leaves_it_cores(
    gpus: str, processes: int | None, is_beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    several = wiring("device=auto", workers=(0, 1, 2), processes=processes)
    assert several.is_evaluated_beside_training is is_beside
    assert not wiring().is_evaluated_beside_training


def test_a_message_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    loop = wiring()
    for text in ("Two of three.", "Two of three.", "One of three."):
        loop._note_once(text)
    assert capsys.readouterr().out == "Two of three.\nOne of three.\n"
