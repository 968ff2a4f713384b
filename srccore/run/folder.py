"""The layout of a run folder: everything that reads or writes one gets its paths from here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from srccore.errors import UserError
from srccore.files import MANIFEST
from srccore.models.policy import POLICY_FILE

__all__ = ["CONFIG", "REPORT", "RunFolder"]

CONFIG = "run.json"
"""The configuration; a pipeline's report keeps it under the same name."""
REPORT = "report.html"
T = TypeVar("T")
_ROUND = re.compile(r"round-(\d+)")


class _Kept(BaseModel):
    aligned: bool


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run folder, whether or not they exist.

    ::

        run.json  figures.json  report.html
        data/{train,calibration,heldout}.parquet
        augment-rationales/{train,calibration}/
        tune-rationale/  sample-responses/  annotate-ratings/  train-scorer/
        round-0/evaluate/                                    the policy after stage 1
        round-<N>/search-candidates-<K>/  score-candidates-<K>/     one of each per shard
        round-<N>/curate-preference/  train-dpo/  evaluate/
        round-<N>/check-before/  check-after/  kept.json     with on_regression: keep_previous

    Every folder above with a slash at its end is the output of one stage.

    Args:
        path: The run folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The run's configuration. A folder without this file is not a run folder."""
        return self.path / CONFIG

    @property
    def figures(self) -> Path:
        """The figures of all rounds evaluated so far."""
        return self.path / "figures.json"

    def known_figures(self) -> list[dict[str, Any]]:
        """Reads the figures of all rounds evaluated so far."""
        return _read(self.figures, list[dict[str, Any]]) if self.figures.exists() else []

    @property
    def report(self) -> Path:
        """The report, one HTML page."""
        return self.path / REPORT

    @property
    def data(self) -> Path:
        """The output of `prepare-data`."""
        return self.path / "data"

    def split(self, name: str) -> Path:
        """A split of the data: ``train``, ``calibration`` or ``heldout``."""
        return self.data / f"{name}.parquet"

    def rationales(self, split: str) -> Path:
        """The output of `augment-rationales` for a split."""
        return self.path / "augment-rationales" / split

    def round(self, number: int) -> Path:
        """The folder of a round."""
        return self.path / f"round-{number}"

    def output(self, stage: str, number: int | None = None, shard: int | None = None) -> Path:
        """The output of a stage: of a run, of a round, or of a shard of a round.

        `prepare-data` and `augment-rationales` have their own places.
        """
        folder = self.path if number is None else self.round(number)
        return folder / (stage if shard is None else f"{stage}-{shard}")

    def all_ratings(self, number: int) -> list[Path]:
        """The finished outputs of `score-candidates` in a round."""
        manifests = self.round(number).glob(f"score-candidates-*/{MANIFEST}")
        return sorted(path.parent for path in manifests)

    def check(self, number: int, when: Literal["before", "after"]) -> Path:
        """The output of `evaluate` on the calibration split, before or after a round's training."""
        return self.round(number) / f"check-{when}"

    def kept(self, number: int) -> Path:
        """What was decided on a round's policy, under ``on_regression: keep_previous``."""
        return self.round(number) / "kept.json"

    def trained_policy(self, number: int) -> Path:
        """The policy file that a round's training wrote; 0 is stage 1."""
        stage = self.output("train-dpo", number) if number else self.output("tune-rationale")
        return stage / POLICY_FILE

    def policy(self, number: int) -> Path:
        """The policy file that a round ended with: its own, or an earlier one that was kept.

        Args:
            number: The round; 0 is stage 1.

        Returns:
            The path of a ``policy.json``.

        Raises:
            UserError: The run has not finished that round.
        """
        finished = self.finished_rounds()
        if number not in finished:
            raise UserError(
                f"The run {self.path} has not finished round {number}.",
                f"Finished rounds: {', '.join(map(str, finished)) or 'none'}. "
                "Resume the run with the srccore run command that started it.",
            )
        while not self.is_kept(number):
            number -= 1
        return self.trained_policy(number)

    def is_kept(self, number: int) -> bool:
        """Whether the run continued with the policy that a round trained."""
        path = self.kept(number)
        return not path.exists() or _read(path, _Kept).aligned

    def round_of(self, folder: Path) -> int | None:
        """The round that a stage's output belongs to; None for what comes before the rounds."""
        match = _ROUND.fullmatch(folder.parent.name)
        # A run folder may itself be called round-3.
        return int(match[1]) if match and folder.parent.parent == self.path else None

    def finished_stages(self) -> list[Path]:
        """The outputs of the finished stages, in no particular order."""
        # No deeper than this: a training's checkpoints have manifests of their own.
        found = (self.path.glob(f"{depth}/{MANIFEST}") for depth in ("*", "*/*"))
        return [manifest.parent for manifests in found for manifest in manifests]

    def finished_rounds(self) -> list[int]:
        """The rounds that have been evaluated, in order."""
        stages = set(self.finished_stages())
        rounds = {self.round_of(folder) for folder in stages}
        return sorted(n for n in rounds if n is not None and self.output("evaluate", n) in stages)


def _read(path: Path, kind: type[T]) -> T:
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise UserError(
            f"{path} cannot be read or is damaged.",
            "Delete it and repeat the srccore run command of this run, which writes it again.",
        ) from None
