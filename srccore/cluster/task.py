"""What a training job is told: one stage, in a text short enough for a pod's command line.

A job's pods share no disk with the step that asks for them, so a task carries the text of the
step's small artifacts (references and policies), and all that these name must lie in a bucket.
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
from srccore.config import Section, explain
from srccore.errors import UserError
from srccore.models.policy import parse_policy
from srccore.steps.step import Finished, Reference, locate_stage, run_stage

__all__ = ["StageTask"]

LARGEST = 2**16
"""Bytes that are read of an artifact; references and policies are far smaller."""
Given = str | Sequence[str] | None


class StageTask(Section):
    """A stage that a job's pods run, as `srccore.steps.step.run_stage` is asked for it."""

    stage: str
    artifact_root: str
    inputs: dict[str, str | list[str] | None]
    """By the stage function's arguments, the texts of the artifacts' files."""
    settings: dict[str, Any]
    device: str = "auto"
    threads: int = 0

    @classmethod
    def of(
        cls,
        stage: str,
        artifact_root: str,
        *,
        inputs: Mapping[str, Given],
        settings: Mapping[str, Any],
        device: str = "auto",
        threads: int = 0,
    ) -> StageTask:
        """Reads the artifacts of a step.

        Args:
            stage: As for `run_stage`; so are the others.
            artifact_root: Where it is a folder, the pods are taken to see this machine's files.
            inputs: The paths of Kubeflow's artifacts.
            settings: The stage function's other arguments, as JSON has them.
            device: ``cpu``, ``cuda`` or ``auto``.
            threads: CPU threads of torch; 0 leaves it alone.

        Returns:
            The task.

        Raises:
            UserError: An artifact is neither a reference nor a policy, or names what the pods do
                not see.
        """
        is_shared = not storage.is_remote(artifact_root)
        return cls(
            stage=stage,
            artifact_root=artifact_root,
            inputs={
                name: _each(given, functools.partial(_read, stage, name, is_shared))
                for name, given in inputs.items()
            },
            settings=dict(settings),
            device=device,
            threads=threads,
        )

    def uri(self) -> str:
        """Where the stage's folder will lie.

        Raises:
            UserError: An input is missing, or a setting does not hold.
        """
        with self._artifacts() as inputs:
            return locate_stage(
                self.stage, self.artifact_root, inputs=inputs, settings=self.settings
            )

    def run(self) -> Finished:
        """Runs the stage here, or finds it done.

        Raises:
            SystemExit: With 2, where the user can mend what is wrong.
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
        """The paths of files with the inputs' texts."""
        with tempfile.TemporaryDirectory() as scratch:
            numbers = itertools.count()

            def write(text: str) -> str:
                # What ends so is a policy's file, and not a folder with one.
                file = Path(scratch) / f"{next(numbers)}.json"
                file.write_text(text, encoding="utf-8")
                return str(file)

            yield {name: _each(value, write) for name, value in self.inputs.items()}

    def to_json(self) -> str:
        """The task as one line."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> StageTask:
        """Reads what `to_json` wrote.

        Raises:
            UserError: It is something else.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise explain("The task", error) from None


def _each(given: Given, do: Callable[[str], str]) -> str | list[str] | None:
    """Does it with one text, with each of several, or with none."""
    if given is None or isinstance(given, str):
        return None if given is None else do(given)
    return [do(each) for each in given]


def _read(stage: str, name: str, is_shared: bool, path: str) -> str:
    """The text of an artifact, where a job's pods can make use of it."""
    mend = "Copy it to a bucket, and give what the component import-output makes of its URI."
    try:
        with Path(path).open("rb") as file:
            text = file.read(LARGEST).decode()
        addresses = _addresses(text)
    except (OSError, ValueError, UserError):
        raise UserError(
            f"The input {name} of {stage} is neither a reference nor a policy, and a job's pods do "
            f"not see {path}.",
            mend,
        ) from None
    unseen = [each for each in addresses if not (is_shared or storage.is_remote(each))]
    if unseen:
        raise UserError(
            f"The input {name} of {stage} names {unseen[0]}, which a job's pods do not see.", mend
        )
    return text


def _addresses(text: str) -> list[str]:
    """What an artifact names; hub ids and the models of this package are no addresses."""
    try:
        return [Reference.model_validate_json(text).uri]
    except ValidationError:
        policy = parse_policy(text, "The artifact")
    base = policy.base.path
    return [*policy.adapters, *([base] if base.startswith(("/", ".", "~", "s3://")) else [])]
