"""A run, followed until it ends: a live tree on a terminal, a line for every change elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text
from rich.tree import Tree

from srccore.kubeflow.client import Backend, UnavailableError
from srccore.kubeflow.runs import FINISHED, get_run
from srccore.kubeflow.tasks import DONE, Task, failures, last_told, task_tree, walk

__all__ = ["Screen", "duration", "ending", "follow", "screen", "tree"]

PATIENCE = 12
"""Requests in a row that may fail before following ends."""
MARKS = {
    "SUCCEEDED": ("✓", "green"),
    "SKIPPED": ("-", "dim"),
    "RUNNING": ("●", "cyan"),
    "FAILED": ("✗", "red"),
    "CANCELING": ("◌", "yellow"),
    "CANCELED": ("◌", "yellow"),
}


class Screen(Protocol):
    """Where a run is shown."""

    def show(self, run: Any) -> None:
        """Shows how far a run has come."""
        ...

    def note(self, text: str) -> None:
        """Says something besides."""
        ...


def follow(
    backend: Backend,
    run_id: str,
    on: Screen,
    *,
    interval: float = 10.0,
    timeout: float | None = None,
) -> Any:
    """Looks after a run until it ends.

    Args:
        backend: Where.
        run_id: The run.
        on: Where it is shown.
        interval: Seconds between two looks.
        timeout: Seconds after which to give up; None for never.

    Returns:
        The ``V2beta1Run``, finished.

    Raises:
        TimeoutError: It has not finished in time; it goes on.
        UnavailableError: The backend did not answer `PATIENCE` times in a row.
    """
    began = time.monotonic()
    failed = 0
    while True:
        try:
            run = get_run(backend, run_id)
        except UnavailableError as error:
            failed += 1
            if failed == PATIENCE:
                raise
            on.note(f"{error.what} Trying again ({failed} of {PATIENCE - 1}).")
        else:
            failed = 0
            on.show(run)
            if run.state in FINISHED:
                return run
        left = interval if timeout is None else began + timeout - time.monotonic()
        if left <= 0:
            raise TimeoutError
        time.sleep(min(interval, left))


@contextmanager
def screen(console: Console) -> Iterator[Screen]:
    """The screen that suits a console."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    picture = _Picture(console)
    with Live(get_renderable=picture.draw, console=console, refresh_per_second=2):
        yield picture


def tree(run: Any) -> Tree:
    """A run as a tree of its tasks; what has finished or not begun is folded into one line."""
    tasks = task_tree(run)
    root = Tree(Text.assemble(f"{run.display_name}  {run.state or 'PENDING'}  ", _progress(tasks)))
    for task in tasks:
        _grow(root, task)
    if (silence := _silence(run)) is not None:
        root.add(Text(silence, "yellow"))
    return root


def ending(run: Any, url: str) -> str:
    """How a finished run ended, with what failed."""
    lines = [f"The run ended: {run.state}."]
    if run.error and run.error.message:
        lines.append(" ".join(run.error.message.split()))
    found = failures(run)
    lines += [
        f"Failed: {name}: {error or 'the backend says no more; its log is in the UI'}"
        for name, error in found
    ]
    if run.state == "FAILED" and not found:
        lines.append(
            "Kubeflow does not say which task. Argo may: kubectl get workflows.argoproj.io,pods "
            f"--selector pipeline/runid={run.run_id}"
        )
    return "\n".join([*lines, url])


class _Lines:
    """Says what has changed since it was asked last."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.states: dict[str, str] = {}
        self.is_silence_told = False

    def show(self, run: Any) -> None:
        tasks = task_tree(run)
        for name, task in walk(tasks):
            if task.state != self.states.get(name, "PENDING"):
                seconds = _seconds(task)
                after = f" ({duration(seconds)})" if seconds and task.finished else ""
                self.note(f"[{_progress(tasks)}] {name}: {task.state.lower()}{after}")
            self.states[name] = task.state
        if not self.is_silence_told and (silence := _silence(run)) is not None:
            self.note(silence)
            self.is_silence_told = True

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


class _Picture:
    """Draws the tree, anew with every refresh: durations grow between two looks."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.run: Any = None

    def show(self, run: Any) -> None:
        self.run = run

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def draw(self) -> RenderableType:
        return "" if self.run is None else tree(self.run)


def _silence(run: Any) -> str | None:
    since = last_told(run)
    if since is None:
        return None
    what = (
        f"Kubeflow has told nothing of single tasks since {since.astimezone():%H:%M}: it cannot "
        "once a run's record has grown beyond 1 MiB."
    )
    if run.state in FINISHED:
        return what
    return f"{what} The run goes on; how it ends will be told."


def _grow(branch: Tree, task: Task) -> None:
    mark, style = MARKS.get(task.state, ("○", "dim"))
    text = Text.assemble((f"{mark} {task.name}", style))
    if task.children:
        text.append(f"  {_progress(task.children)}", "dim")
    if (seconds := _seconds(task)) is not None:
        text.append(f"  {duration(seconds)}", "dim")
    if task.error:
        text.append(f"  {task.error}", "red")
    grown = branch.add(text)
    if task.state not in (*DONE, "PENDING"):
        for child in task.children:
            _grow(grown, child)


def _progress(tasks: tuple[Task, ...]) -> str:
    leaves = [task for _, task in walk(tasks)]
    return f"{sum(task.state in DONE for task in leaves)}/{len(leaves)}"


def _seconds(task: Task) -> float | None:
    if task.started is None:
        return None
    return ((task.finished or datetime.now(UTC)) - task.started).total_seconds()


def duration(seconds: float) -> str:
    """Seconds for a reader."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
