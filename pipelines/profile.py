"""What is fixed when a pipeline is compiled: how wide it is, and what its pods request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, field_validator
from pydantic_core import PydanticKnownError

from srccore.cluster.request import (
    INPROCESS,
    LAUNCHERS,
    PYTORCHJOB,
    QUANTITY,
    PodSettings,
    SecretKeys,
    Toleration,
    TrainingJob,
)
from srccore.config import RunConfig, Section, explain, read_yaml_file
from srccore.containers.names import USER_ID
from srccore.errors import UserError
from srccore.stages.table import STAGES

__all__ = ["Profile", "Resources", "StageSecretKeys", "TrainingJobs", "load_profile"]

Stages = TypeVar("Stages", tuple[str, ...], dict[str, Any])


def _known(stages: Stages) -> Stages:
    if unknown := sorted(set(stages) - set(STAGES)):
        raise ValueError(f"unknown stage {unknown[0]}; choose from {', '.join(STAGES)}")
    return stages


def _trains(stages: tuple[str, ...]) -> tuple[str, ...]:
    training = [name for name, stage in STAGES.items() if stage.trains]
    if others := [name for name in stages if name not in training]:
        raise ValueError(f"{others[0]} is not one of {', '.join(training)}")
    return stages


class Resources(Section):
    """What the pod of a task requests."""

    cpu: str = Field(pattern=r"^[0-9]+(\.[0-9]+)?m?$")
    """Request; there is no limit, so a pod may use idle CPUs of its node."""
    memory: str = Field(pattern=QUANTITY)
    """Request and limit."""
    gpus: int = Field(default=0, ge=0)
    shared_memory: str | None = Field(default=None, pattern=QUANTITY)
    """Size of ``/dev/shm``, which counts as memory; None keeps the runtime's 64 MiB."""
    timeout_hours: float = Field(gt=0)
    retries: int = Field(default=2, ge=0)
    """A retried task resumes where possible: finished work is found by its inputs."""


class StageSecretKeys(SecretKeys):
    """Environment variables from a Secret, for the pods of some or all stages."""

    stages: Annotated[tuple[str, ...], AfterValidator(_known)] = ()
    """The stages whose pods get them; empty means all."""


class TrainingJobs(TrainingJob):
    """The training stages that run as jobs, and what their jobs have in common."""

    stages: Annotated[tuple[str, ...], AfterValidator(_trains)] = ("train-dpo",)
    """The others train in the pods of their steps."""


class Profile(PodSettings):
    """A cluster, and the shape of a pipeline on it.

    Method and data are not part of it: they are run-time parameters whose defaults are the
    preset's values.
    """

    rounds: int = Field(default=3, ge=1)
    shards: int = Field(default=1, ge=1)
    """Number of pods that search a round's samples, and of those that score them."""
    parallelism: int | None = Field(default=None, ge=1)
    """How many of them run at the same time; None means all."""
    augment: bool = True
    """Whether a teacher writes the rationales that are missing in the data."""
    scorer: Literal["train", "train-on-given-pairs", "given"] = "train"
    """Where R-Scorer comes from: trained on sampled responses that a teacher rates, trained on
    labelled pairs at ``labelled_pairs_uri``, or already trained at ``scorer_uri``."""
    launcher: str = PYTORCHJOB.name
    """What runs the training jobs: one of `srccore.cluster.request.LAUNCHERS`, or ``inprocess``,
    with which there are none, and every stage trains in the pod of its step."""
    training_job: TrainingJobs = TrainingJobs()
    launcher_resources: Resources | None = None
    """Of the step that watches a job; None means few, for as long as the job may take."""

    light: Resources = Resources(cpu="1", memory="4Gi", timeout_hours=12)
    """Of stages without a model."""
    models: Resources = Resources(
        cpu="8", memory="64Gi", gpus=1, shared_memory="8Gi", timeout_hours=48
    )
    """Of stages that run a model."""
    stages: Annotated[dict[str, Resources], AfterValidator(_known)] = Field(default_factory=dict)
    """Override both for single stages."""

    tolerations: tuple[Toleration, ...] = (
        Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule"),
    )

    run_as_user: int | None = Field(default=USER_ID, ge=1)
    """The user of the images. None sets no security context: backends before 2.16 reject it."""
    secrets: tuple[StageSecretKeys, ...] = ()

    @field_validator("launcher")
    @classmethod
    def _launcher_exists(cls, launcher: str) -> str:
        if launcher in (INPROCESS, *LAUNCHERS):
            return launcher
        names = [repr(name) for name in (INPROCESS, *LAUNCHERS)]
        expected = f"{', '.join(names[:-1])} or {names[-1]}"
        raise PydanticKnownError("literal_error", {"expected": expected})

    def resources(self, stage: str) -> Resources:
        """The resources of the pod of a stage."""
        base = self.light if STAGES[stage].base == "light" else self.models
        return self.stages.get(stage, base)

    def gpu_stages(self) -> list[str]:
        """The stages whose pods request GPUs, in the order of the method."""
        models = (name for name, stage in STAGES.items() if stage.base == "models")
        return [name for name in models if self.resources(name).gpus]

    def is_job(self, stage: str) -> bool:
        """Whether a stage trains as a job, which its step watches."""
        return self.launcher in LAUNCHERS and stage in self.training_job.stages

    def launching(self, stage: str) -> Resources:
        """The resources of the pod of a step that watches the training job of a stage."""
        training = self.resources(stage)
        both_clocks = self.training_job.waiting_hours + training.timeout_hours
        return self.launcher_resources or Resources(
            cpu="200m", memory="512Mi", timeout_hours=both_clocks + 1, retries=training.retries
        )


def load_profile(path: Path | None, config: RunConfig, **changes: Any) -> Profile:
    """Loads a profile.

    Args:
        path: A YAML file with fields of `Profile`; None means the defaults.
        config: The run: sets rounds and shards. If its device is the CPU, pods request no GPU,
            and training needs no operator.
        **changes: Fields that override the file; None does not.

    Returns:
        The profile.

    Raises:
        UserError: The file cannot be read, or a field is unknown or invalid.
    """
    values: dict[str, Any] = {"rounds": config.rounds, "shards": config.shards}
    if config.device == "cpu":
        # Such a pipeline is a trial, and its user wants to see a failure at once.
        values["models"] = Resources(cpu="2", memory="8Gi", timeout_hours=12, retries=0)
        values["light"] = Resources(cpu="1", memory="2Gi", timeout_hours=12, retries=0)
        values["launcher"] = INPROCESS
    if path is not None:
        values |= _read(path)
    values |= {name: value for name, value in changes.items() if value is not None}
    source = f"The profile {path}" if path else "The profile"
    try:
        profile = Profile.model_validate(values)
    except ValidationError as error:
        advice = "Fix {name} in the profile or on the command line."
        raise explain(f"profile ({path})" if path else "profile", error, advice) from None
    if launcher := LAUNCHERS.get(profile.launcher):
        launcher.check(source, {**dict(profile), **dict(profile.training_job)})
    for name, stage in STAGES.items():
        gpus = profile.resources(name).gpus
        if stage.trains and gpus > 1 and not profile.is_job(name):
            raise UserError(
                f"{source} gives {name} {gpus} GPUs, but in the pod of its step it trains on one.",
                f"Add {name} to training_job.stages, or set its gpus to 1.",
            )
    return profile


def _read(path: Path) -> dict[str, Any]:
    fix = "Pass a YAML file with the fields that docs/pipelines.md lists."
    try:
        values = read_yaml_file(path)
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read the profile {path}: {error}.", fix) from None
    if not isinstance(values, dict):
        raise UserError(f"The profile {path} is not a YAML mapping.", fix)
    return values
