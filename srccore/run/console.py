"""Console output of a run: live progress on a terminal, plain lines elsewhere, and a table."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from srccore.method import evaluation
from srccore.training.machine import Figures
from srccore.training.machine import Progress as Report

__all__ = ["ConsoleObserver", "figures_table", "quiet_libraries"]

LINE_EVERY = 10.0
"""Seconds between two progress lines of a stage, and over which its speed is measured."""


class ConsoleObserver:
    """Shows the progress of a run on a console.

    Args:
        console: Where to write; standard output by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, highlight=False)
        self.worked = False
        self._lock = threading.Lock()
        self._bars: Progress | None = None
        self._shown = 0

    @classmethod
    def on_stderr(cls) -> ConsoleObserver:
        """For commands whose output is on stdout."""
        return cls(Console(stderr=True, highlight=False))

    @contextmanager
    def stage(self, name: str, round_number: int | None) -> Iterator[Report]:
        """Shows a stage's progress while it runs, then a line with the time it took."""
        title = name if round_number is None else f"round {round_number}: {name}"
        began = time.monotonic()
        is_working = False
        show = self._bar if self.console.is_terminal else self._lines
        with show(title) as display:

            def report(done: int, total: int, tokens: int = 0) -> None:
                nonlocal is_working
                is_working = True
                display(done, total, tokens)

            yield report
        if is_working:
            self.worked = True
            seconds = time.monotonic() - began
            self.console.print(f"{title:<36} {seconds:8.1f} s", markup=False)

    @contextmanager
    def _bar(self, title: str) -> Iterator[Report]:
        # A console has one live display, and an evaluation may run beside a training.
        with self._lock:
            if self._bars is None:
                self._bars = self._new_bars()
                self._bars.start()
            bars = self._bars
            self._shown += 1
        task = bars.add_task(title, total=None, speed="")
        speed = _Speed()

        def report(done: int, total: int, tokens: int = 0) -> None:
            speed.update(tokens)
            bars.update(task, completed=done, total=total, speed=speed.text)

        try:
            yield report
        finally:
            bars.remove_task(task)
            with self._lock:
                self._shown -= 1
                if not self._shown:
                    bars.stop()
                    self._bars = None

    def close(self) -> None:
        """Gives the terminal its cursor back, also where an interrupted run still shows a stage."""
        with self._lock:
            if self._bars is not None:
                self._bars.stop()

    def _new_bars(self) -> Progress:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
        )
        return Progress(*columns, console=self.console, transient=True)

    @contextmanager
    def _lines(self, title: str) -> Iterator[Report]:
        speed = _Speed()

        def report(done: int, total: int, tokens: int = 0) -> None:
            if speed.update(tokens):
                measured = f", {speed.text}" if speed.text else ""
                self.console.print(f"{title}: {done} of {total}{measured}", markup=False)

        yield report

    def figures(self, figures: list[Figures]) -> None:
        """Prints the table of figures, unless all stages were skipped."""
        if self.worked:
            self.console.print(figures_table(figures))

    def note(self, text: str) -> None:
        """Prints a message."""
        self.console.print(text, markup=False)


class _Speed:
    """Measures the tokens per second of a stage, again and again."""

    def __init__(self) -> None:
        self.text = ""
        """The last measurement; empty in a stage that counts no tokens."""
        self._tokens = 0
        self._since = time.monotonic()

    def update(self, tokens: int) -> bool:
        """Counts the tokens so far; returns whether the time of a measurement is over."""
        seconds = time.monotonic() - self._since
        if seconds < LINE_EVERY:
            return False
        if tokens:
            self.text = f"{(tokens - self._tokens) / seconds:,.0f} tokens/s"
        self._tokens, self._since = tokens, self._since + seconds
        return True


def figures_table(figures: list[Figures]) -> Table:
    """The figures by round in percent, each with half the width of its 95% interval."""
    table = Table(
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=f"Held-out metrics in percent, with 95% intervals (n = {figures[0]['n']})",
    )
    table.add_column("after", no_wrap=True)
    for figure in evaluation.SHOWN:
        table.add_column(figure.short, justify="right", no_wrap=True)
    for row in figures:
        after = f"round {row['round']}" if row["round"] else "stage 1"
        table.add_row(after, *(_cell(row, figure) for figure in evaluation.SHOWN))
    return table


def _cell(row: Figures, figure: evaluation.Figure) -> str:
    value, interval = row[figure.key], row["interval"].get(figure.key)
    if value is None or interval is None:
        return "-"
    if figure.unit == "tokens":
        return f"{value:.1f}"
    half = 50 * (interval[1] - interval[0])
    return f"{100 * value:.1f} ±{half:.0f}"


def quiet_libraries() -> None:
    """Makes the libraries print errors only, send no telemetry, and wait without spinning.

    It must be called before torch is imported: OpenMP reads its settings once.
    """
    # A thread that spins takes the core from the one it waits for, unless every thread has a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # TRL reports every training run, which hangs where a cluster's egress policy drops traffic.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
