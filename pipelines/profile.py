"""What is fixed when a pipeline is compiled: how wide it is, and what its pods ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticKnownError

from srccore.cluster.request import (
    INPROCESS,
    LAUNCHERS,
    PYTORCHJOB,
    QUANTITY,
    CaBundle,
    SecretKeys,
    Toleration,
)
from srccore.config import RunConfig, Section, explain
from srccore.containers.names import USER_ID
from srccore.errors import UserError
from srccore.stages.table import STAGES

__all__ = ["Profile", "Resources", "StageSecretKeys", "TrainingJob", "load_profile"]


def _known(stages: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := sorted(set(stages) - set(STAGES)):
        raise ValueError(f"there is no stage {unknown[0]}; there are {', '.join(STAGES)}")
    return stages


class Resources(Section):
    """What the pod of a task asks for."""

    cpu: str = Field(pattern=r"^\d+(\.\d+)?m?$")
    """Request; there is no limit, so a pod may use what its node has left."""
    memory: str = Field(pattern=QUANTITY)
    """Request and limit."""
    gpus: int = Field(default=0, ge=0)
    shared_memory: str | None = Field(default=None, pattern=QUANTITY)
    """Size of ``/dev/shm``, which counts as memory; None leaves the runtime's 64 MiB."""
    timeout_hours: float = Field(gt=0)
    retries: int = Field(default=2, ge=0)
    """A retried task goes on where it can: finished work is found by its inputs."""


class StageSecretKeys(SecretKeys):
    """Environment variables from a Secret, for the pods of some stages or of all."""

    stages: tuple[str, ...] = ()
    """Stages whose pods get them; none named is all."""

    @field_validator("stages")
    @classmethod
    def _stages_exist(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        return _known(stages)


class TrainingJob(Section):
    """DPO as a job; each of its pods asks for what the profile gives to ``train-dpo``."""

    pods: int = Field(default=1, ge=1)
    queue: str | None = None
    """Kueue's LocalQueue."""
    priority_class: str | None = None
    service_account: str | None = None
    """Of the job's pods, which ask nothing of the API server; None is the namespace's default."""
    waiting_hours: float = Field(default=24, gt=0)
    """For a place in the queue and on nodes. How long it may run is the timeout of train-dpo."""
    max_restarts: int = Field(default=10, ge=0)
    """Pods lost and made again, all together; preemption is the usual cause."""
    ttl_hours: float = Field(default=24, gt=0)
    """After which a finished job is removed, with its pods and their logs."""


class Profile(Section):
    """A cluster, and the shape that a pipeline takes on it.

    Method and data are no part of it: they are run-time parameters with the preset's values as
    defaults.
    """

    rounds: int = Field(default=3, ge=1)
    shards: int = Field(default=1, ge=1)
    """Pods that search a round's samples, and as many that score them."""
    parallelism: int | None = Field(default=None, ge=1)
    """How many of them run at once; None is all."""
    augment: bool = True
    """Whether a teacher writes the rationales that the data lack."""
    scorer: Literal["train", "train-on-given-pairs", "given"] = "train"
    """Where R-Scorer comes from: sampled responses that a teacher rates, labelled pairs at
    ``labelled_pairs_uri``, or a finished one at ``scorer_uri``."""
    launcher: str = PYTORCHJOB.name
    """Where DPO trains: ``inprocess`` in its step's pod, each other launcher as a job that the
    step watches."""
    training_job: TrainingJob = TrainingJob()
    launcher_resources: Resources | None = None
    """Of the step that watches a job; None is little, for as long as the job may take."""

    light: Resources = Resources(cpu="1", memory="4Gi", timeout_hours=12)
    """Of stages without a model."""
    models: Resources = Resources(
        cpu="8", memory="64Gi", gpus=1, shared_memory="8Gi", timeout_hours=48
    )
    """Of stages that run a model."""
    stages: dict[str, Resources] = Field(default_factory=dict)
    """Of single stages, instead."""

    accelerator: str = "nvidia.com/gpu"
    """The extended resource that a GPU is asked for by."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Of tasks that ask for a GPU; a run may change it, and the tolerations."""
    tolerations: tuple[Toleration, ...] = (
        Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule"),
    )

    run_as_user: int | None = Field(default=USER_ID, ge=1)
    """The images' user. None writes no security context: backends before 2.16 refuse one."""
    image_pull_secrets: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    """Of every task: a proxy, ``AWS_ENDPOINT_URL``, ``AWS_REGION``. No secrets."""
    secrets: tuple[StageSecretKeys, ...] = ()
    ca_bundle: CaBundle | None = None
    cache_claim: str | None = None
    """A PersistentVolumeClaim (ReadWriteMany, writable by the user) for models and data; None
    gives each pod an emptyDir."""

    @field_validator("stages")
    @classmethod
    def _stages_exist(cls, stages: dict[str, Resources]) -> dict[str, Resources]:
        _known(tuple(stages))
        return stages

    @field_validator("launcher")
    @classmethod
    def _launcher_exists(cls, launcher: str) -> str:
        if launcher in (INPROCESS, *LAUNCHERS):
            return launcher
        names = [repr(name) for name in (INPROCESS, *LAUNCHERS)]
        expected = f"{', '.join(names[:-1])} or {names[-1]}"
        raise PydanticKnownError("literal_error", {"expected": expected})

    def resources(self, stage: str) -> Resources:
        """What the pod of a stage asks for."""
        base = self.light if STAGES[stage].base == "light" else self.models
        return self.stages.get(stage, base)

    def launching(self) -> Resources:
        """What the pod of a step asks for that watches a training job."""
        training = self.resources("train-dpo")
        both_clocks = self.training_job.waiting_hours + training.timeout_hours
        return self.launcher_resources or Resources(
            cpu="200m", memory="512Mi", timeout_hours=both_clocks + 1, retries=training.retries
        )


def load_profile(path: Path | None, config: RunConfig, **changes: Any) -> Profile:
    """Loads a profile.

    Args:
        path: A YAML file of `Profile`'s fields; None takes the defaults.
        config: The run: gives rounds and shards. Where its device is the CPU, pods ask for no GPU
            and DPO for no operator.
        **changes: Fields that win over all; None is none.

    Returns:
        The profile.

    Raises:
        UserError: The file cannot be read, or a field is unknown or ill-typed.
    """
    values: dict[str, Any] = {"rounds": config.rounds, "shards": config.shards}
    if config.device == "cpu":
        # Such a pipeline is tried out: whoever looks on wants to hear of a failure at once.
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
        wrong = explain(source, error)
        name = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UserError(wrong.what, f"Mend {name} in the profile or on the command line.") from None
    if launcher := LAUNCHERS.get(profile.launcher):
        launcher.check(source, {**dict(profile), **dict(profile.training_job)})
    return profile


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"The profile {path} cannot be read: {' '.join(str(error).split())}.",
            "Give a YAML file of the fields that docs/pipelines.md lists.",
        ) from None
    if not isinstance(values, dict):
        raise UserError(
            f"The profile {path} is not a YAML mapping.",
            "Give a YAML file of the fields that docs/pipelines.md lists.",
        )
    return values
