"""How a stage's work is done: nothing here changes what comes out.

Here, and not with the stages, because the trainings below them take it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from srccore.config import EngineConfig
from srccore.training.resume import Checkpoints

__all__ = ["Figures", "Machine", "Progress"]

Figures = dict[str, Any]
"""What a stage measured of its work, as JSON."""


class Progress(Protocol):
    """Receives a stage's progress; a skipped stage reports nothing."""

    def __call__(self, done: int, total: int, tokens: int = 0) -> None:
        """Receives how much is done.

        Args:
            done: What is done, also by an earlier attempt.
            total: What there is to do.
            tokens: What this attempt's engines have written or, in a stage that only reads, read.
        """
        ...


def _silent(done: int, total: int, tokens: int = 0) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class Machine:
    """Where and how a stage works.

    Attributes:
        device: ``cpu``, ``cuda`` or ``auto``.
        progress: Receives the stage's progress.
        checkpoints: Where a training stage keeps its states; None is ``checkpoint`` in its folder.
        workers: Numbers of the processes among which the stage divides its samples; none if it
            works on them itself. See `srccore.stages.workers`.
        parts: The address in a bucket for the parts of the stage's journal; None if its folder is
            durable. See `srccore.stages.parts`.
    """

    device: str = "auto"
    progress: Progress = _silent
    checkpoints: Checkpoints | None = None
    workers: tuple[int, ...] = ()
    parts: str | None = None

    def leaves_gpu_to_others(self, engine: EngineConfig) -> bool:
        """Whether other processes than this one run a stage's engine.

        Args:
            engine: The stage's engine: vLLM has processes of its own.
        """
        return bool(self.workers) or engine.name == "vllm"
