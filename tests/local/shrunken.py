"""Preset `tiny`, shrunk to the size of a test, and an observer that records events."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from srccore.config import RunConfig, load_config
from srccore.training.machine import Figures, Progress

SETTINGS = (
    "threads=1",
    "data.train=80",
    "data.calibration=60",
    "data.heldout=24",
    "rationale.samples=48",
    # So short a training does not teach the format.
    "rationale.min_format_rate=0",
    "annotation.samples=24",
    "search.samples=24",
    "evaluation.resamples=100",
    "curation.min_margin=0",
    "curation.answer_gate=off",
    "curation.anchor_tolerance=1",
    "rounds=1",
)


def shrunken(*more: str) -> RunConfig:
    """The configuration, with further overrides."""
    return load_config("tiny", [*SETTINGS, *more])


class Recorder:
    """An observer that records events.

    Args:
        interrupt_at: The stage that is interrupted, as by Ctrl-C, when it first reports progress.
    """

    def __init__(self, interrupt_at: str | None = None) -> None:
        self.worked: list[str] = []
        self.notes: list[str] = []
        self.interrupt_at = interrupt_at

    @contextmanager
    def stage(self, name: str, round_number: int | None) -> Iterator[Progress]:
        """Records the stages that do any work."""

        def report(done: int, total: int, tokens: int = 0) -> None:
            if not self.worked or self.worked[-1] != name:
                self.worked.append(name)
            if name == self.interrupt_at:
                raise KeyboardInterrupt

        yield report

    def figures(self, figures: list[Figures]) -> None:
        """Ignores figures."""

    def note(self, text: str) -> None:
        """Records messages."""
        self.notes.append(text)
