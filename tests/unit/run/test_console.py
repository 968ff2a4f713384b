"""What a run shows on a terminal."""

from __future__ import annotations

import io

from rich.console import Console

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
