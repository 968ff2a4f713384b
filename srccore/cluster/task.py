"""What a training job runs: one stage, as text that fits on a pod's command line.

The pods of a job share no disk with the step that creates it. So a task contains the text of the
step's small artifacts (references and policies), and everything that these name must be in a
bucket.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from srccore import storage
from srccore.cluster.request import pods_reach
from srccore.config import Section, explain
from srccore.errors import UserError
from srccore.models.policy import parse_policy
from srccore.stages.table import STAGES
from srccore.steps.step import Finished, Reference, locate_stage, run_stage

__all__ = ["StageTask", "check_checkpoints", "read_artifacts"]

LARGEST = 2**16
"""How many bytes of an artifact are read; references and policies are far smaller."""
Given = str | Sequence[str] | None


class StageTask(Section):
    """A stage for the pods of a job to run, as the arguments of `srccore.steps.step.run_stage`.

    The artifact root must be in a bucket: the pods share no disk with the step.
    """

    stage: str
    artifact_root: str
    inputs: dict[str, str | list[str] | None]
    """The text of each artifact's file, by the stage function's argument."""
    settings: dict[str, Any]
    device: str = "auto"
    threads: int = 0

    def uri(self) -> str:
        """The URI of the stage's output folder.

        Raises:
            UserError: An input is missing, or a setting is invalid.
        """
        with self._artifacts() as inputs:
            return locate_stage(
                self.stage, self.artifact_root, inputs=inputs, settings=self.settings
            )

    def run(self) -> Finished:
        """Runs the stage here, unless it is already finished.

        Raises:
            SystemExit: With 2, for an error that the user can fix.
        """
        with self._artifacts() as inputs:
            return run_stage(
                self.stage,
                self.artifact_root,
                inputs=inputs,
                settings=self.settings,
                device=self.device,
                threads=self.threads,
            )

    @contextmanager
    def _artifacts(self) -> Iterator[dict[str, str | list[str] | None]]:
        """Writes the inputs to files and yields their paths."""
        with tempfile.TemporaryDirectory() as scratch:
            numbers = itertools.count()

            def write(text: str) -> str:
                # The ending marks a policy's file, as opposed to a folder with one.
                file = Path(scratch) / f"{next(numbers)}.json"
                file.write_text(text, encoding="utf-8")
                return str(file)

            yield {name: _each(value, write) for name, value in self.inputs.items()}

    @classmethod
    def from_json(cls, text: str) -> StageTask:
        """Reads a task that was written with ``model_dump_json``.

        Raises:
            UserError: The text is not a valid task.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise explain("task", error, "Start the pod as srccore starts it.") from None


def read_artifacts(stage: str, paths: Mapping[str, Given]) -> dict[str, str | list[str] | None]:
    """Reads the artifacts of a step.

    Args:
        stage: The stage that they are inputs of.
        paths: The paths of Kubeflow's artifacts, by the stage function's argument.

    Returns:
        Their texts, as `StageTask.inputs`.

    Raises:
        UserError: An artifact is neither a reference nor a policy, or names something that the
            pods of a job cannot access.
    """
    return {
        name: _each(given, functools.partial(_read, stage, name)) for name, given in paths.items()
    }


def check_checkpoints(stage: str, settings: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that the pods of a job cannot access.

    Args:
        stage: The stage.
        settings: As `StageTask.settings`.

    Raises:
        UserError: A section of the settings names one.
    """
    for name in STAGES[stage].sources:
        path = (settings.get(name) or {}).get("path")
        if isinstance(path, str) and not pods_reach(path):
            section = STAGES[stage].sections[name]
            raise UserError(
                f"{section}.path of {stage} is {path}, which a job's pods cannot access.",
                f"Copy it to a bucket, and set {section}.path to s3://BUCKET/PATH.",
            )


def _each(given: Given, do: Callable[[str], str]) -> str | list[str] | None:
    """Applies a function to one text, to each of several, or to none."""
    if given is None or isinstance(given, str):
        return None if given is None else do(given)
    return [do(each) for each in given]


def _read(stage: str, name: str, path: str) -> str:
    """The text of an artifact, provided that the pods of a job can use it."""
    fix = "Copy it to a bucket, and pass the output of the component import-output for its URI."
    try:
        with Path(path).open("rb") as file:
            text = file.read(LARGEST).decode()
        unseen = _unseen(text)
    except (OSError, ValueError, UserError):
        raise UserError(
            f"The input {name} of {stage} is neither a reference nor a policy, and the pods of a "
            f"job cannot access {path}.",
            fix,
        ) from None
    if unseen:
        raise UserError(
            f"The input {name} of {stage} names {unseen[0]}, which a job's pods cannot access.",
            fix,
        )
    return text


def _unseen(text: str) -> list[str]:
    """What an artifact names and the pods of a job cannot access."""
    try:
        addresses, base = [Reference.model_validate_json(text).uri], ""
    except ValidationError:
        policy = parse_policy(text, "The artifact")
        addresses, base = [*policy.adapters], policy.base.path
    unseen = [each for each in addresses if not storage.is_remote(each)]
    return [*unseen, *([base] if base and not pods_reach(base) else [])]
