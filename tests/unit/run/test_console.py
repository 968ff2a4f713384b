"""What a run shows on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from srccore.run import console
from srccore.run.console import ConsoleObserver

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def test_an_interrupted_run_gives_the_cursor_back_while_an_evaluation_is_still_shown() -> None:
    terminal = io.StringIO()
    observer = ConsoleObserver(Console(file=terminal, force_terminal=True))
    with observer.stage("evaluate", 1) as report:
        report(1, 2)
        with observer.stage("train-dpo", 2):
            pass
        assert terminal.getvalue().rfind(HIDE) > terminal.getvalue().rfind(SHOW)
        observer.close()
        assert terminal.getvalue().rfind(SHOW) > terminal.getvalue().rfind(HIDE)
        # The thread of the evaluation may not know yet.
        report(2, 2)
        with observer.stage("evaluate", 2):
            pass
        assert terminal.getvalue().rfind(SHOW) > terminal.getvalue().rfind(HIDE)
    observer.close()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_stage_shows_the_tokens_per_second_of_the_last_ten_seconds(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: clock)
    shown = io.StringIO()
    observer = ConsoleObserver(Console(file=shown, force_terminal=is_terminal, width=120))
    with observer.stage("search-candidates", 1) as report:
        for now, done, tokens in [(104.0, 1, 400), (120.0, 2, 30_000), (130.0, 3, 55_004)]:
            clock = now
            report(done, 40, tokens)
            if observer._bars is not None:
                observer._bars.refresh()
    observer.close()
    # 30,000 tokens in 20 seconds, loading the model included, then 25,004 in ten.
    assert shown.getvalue().index("1,500 tokens/s") < shown.getvalue().index("2,500 tokens/s")
    if not is_terminal:
        first, second, _ = shown.getvalue().splitlines()
        assert first == "round 1: search-candidates: 2 of 40, 1,500 tokens/s"
        assert second == "round 1: search-candidates: 3 of 40, 2,500 tokens/s"


def test_a_stage_that_counts_no_tokens_shows_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: clock)
    shown = io.StringIO()
    with ConsoleObserver(Console(file=shown)).stage("prepare-data", None) as report:
        clock = 11.0
        report(3, 4)
    assert shown.getvalue().splitlines()[0] == "prepare-data: 3 of 4"
