"""Follows a run until it ends: a live tree on a terminal, a line per change elsewhere."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text
from rich.tree import Tree

from srccore.kubeflow.client import Backend, UnavailableError
from srccore.kubeflow.runs import FINISHED, get_run
from srccore.kubeflow.tasks import DONE, Task, failures, last_report, task_tree, walk
from srccore.shown import visible

__all__ = ["Screen", "duration", "ending", "follow", "screen", "tree"]

PATIENCE = 12
"""Consecutive requests that may fail before following stops."""
MARKS = {
    "SUCCEEDED": ("✓", "green"),
    "SKIPPED": ("-", "dim"),
    "RUNNING": ("●", "cyan"),
    "FAILED": ("✗", "red"),
    "CANCELING": ("◌", "yellow"),
    "CANCELED": ("◌", "yellow"),
}


class Screen(ABC):
    """Shows a run on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @abstractmethod
    def show(self, run: Any) -> None:
        """Shows the progress of a run."""

    def note(self, text: str) -> None:
        """Prints a message."""
        self.console.print(visible(text), markup=False, soft_wrap=True)


def follow(
    backend: Backend,
    run_id: str,
    on: Screen,
    *,
    interval: float = 10.0,
    timeout: float | None = None,
) -> Any:
    """Follows a run until it ends.

    Args:
        backend: The backend.
        run_id: The ID of the run.
        on: The screen that shows it.
        interval: Seconds between two requests.
        timeout: Seconds after which to stop following; None for no limit.

    Returns:
        The finished ``V2beta1Run``.

    Raises:
        TimeoutError: The run has not finished in time; it keeps running.
        UnavailableError: The backend did not respond to `PATIENCE` consecutive requests.
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
    """The screen for a console: a live tree on a terminal, otherwise lines."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    picture = _Picture(console)
    with Live(get_renderable=picture.draw, console=console, refresh_per_second=2):
        yield picture


def tree(run: Any) -> Tree:
    """A run as a tree of its tasks, which collapses tasks that have finished or not started."""
    tasks = task_tree(run)
    name = visible(run.display_name)
    root = Tree(Text.assemble(f"{name}  {run.state or 'PENDING'}  ", _progress(tasks)))
    for task in tasks:
        _grow(root, task)
    if (silence := _silence(run)) is not None:
        root.add(Text(silence, "yellow"))
    return root


def ending(run: Any, url: str) -> str:
    """How a finished run ended, and the tasks that failed."""
    lines = [f"The run ended: {run.state}."]
    if run.error and run.error.message:
        lines.append(" ".join(run.error.message.split()))
    found = failures(run)
    lines += [
        f"Failed: {name}: {error or 'Kubeflow gives no reason; see the log in the UI'}"
        for name, error in found
    ]
    if run.state == "FAILED" and not found:
        lines.append(
            "Kubeflow does not report which task failed. Argo may: "
            "kubectl get workflows.argoproj.io,pods "
            f"--selector pipeline/runid={run.run_id}"
        )
    return visible("\n".join([*lines, url]))


class _Lines(Screen):
    """Prints a line for each change."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.states: dict[str, str] = {}
        self.is_silence_noted = False

    def show(self, run: Any) -> None:
        tasks = task_tree(run)
        for name, task in walk(tasks):
            if task.state != self.states.get(name, "PENDING"):
                seconds = _seconds(task)
                after = f" ({duration(seconds)})" if seconds and task.finished else ""
                self.note(f"[{_progress(tasks)}] {name}: {task.state.lower()}{after}")
            self.states[name] = task.state
        if not self.is_silence_noted and (silence := _silence(run)) is not None:
            self.note(silence)
            self.is_silence_noted = True


class _Picture(Screen):
    """Redraws the tree with every refresh, since durations grow between two requests."""

    run: Any = None

    def show(self, run: Any) -> None:
        self.run = run

    def draw(self) -> RenderableType:
        return "" if self.run is None else tree(self.run)


def _silence(run: Any) -> str | None:
    since = last_report(run)
    if since is None:
        return None
    what = (
        f"Kubeflow stopped reporting individual tasks at {since.astimezone():%H:%M}: it can't once "
        "the run's record exceeds 1 MiB."
    )
    if run.state in FINISHED:
        return what
    return f"{what} The run continues, and its final state will be reported."


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
    """A duration as text: 12 s, 3 min 4 s, 5 h 6 min."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
