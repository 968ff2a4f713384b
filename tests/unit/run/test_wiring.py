"""Where the loop does the work of a stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from srccore.config import load_config
from srccore.run.console import ConsoleObserver
from srccore.run.folder import RunFolder
from srccore.run.loop import _Wiring


def wiring(*settings: str, workers: tuple[int, ...] = ()) -> _Wiring:
    return _Wiring(load_config("tiny", settings), RunFolder(Path()), ConsoleObserver(), workers)


def test_a_stage_on_vllm_has_a_process_of_its_own_also_on_one_gpu() -> None:
    mixed = wiring("search.engine.name=vllm")
    assert mixed.divided("search-candidates", ()) == (0,)
    assert mixed.divided("sample-responses", (0, 1)) == (0, 1)
    assert mixed.divided("score-candidates", ()) == ()
    assert mixed.divided("evaluate", (1,)) == (1,)
    assert mixed.divided("train-dpo", (0, 1)) == ()


@pytest.mark.parametrize(
    ("gpus", "is_left"),
    [("", True), ("0", False), ("0,1", False), ("0,1,2", True), ("0,1,2,3", True)],
)
def test_an_evaluation_is_left_to_workers_that_do_not_share_the_gpu_of_the_training(
    gpus: str, is_left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert wiring("device=auto", workers=(0, 1, 2)).is_evaluated_beside_training is is_left
    assert not wiring().is_evaluated_beside_training
