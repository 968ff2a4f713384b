"""What a training job consists of, and how it is written for the operator that runs it.

Pure: nothing here talks to a cluster. All pods of a job are identical; each has one container that
runs `srccore.cluster.entry`. They meet the Pod Security standard ``restricted``: no root, no
capabilities, a read-only root file system.

Assumes the Training Operator 1.9 for a PyTorchJob. A TrainJob is written for Trainer 2.1
(``v1alpha1``, whose override field was renamed twice) and relies on the TrainingRuntime of
``manifests/components/trainjob``, since overrides of that version have no security context. To add
an operator, write a function for the spec of its jobs and add a `Launcher` to `LAUNCHERS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from srccore.config import Section
from srccore.containers.names import CACHE, USER_ID
from srccore.errors import UserError
from srccore.hashing import hash_text

__all__ = [
    "ARGO",
    "INPROCESS",
    "LAUNCHERS",
    "PYTORCHJOB",
    "SPEC_HASH",
    "TRAINING_RUNTIME",
    "TRAINJOB",
    "CaBundle",
    "JobSettings",
    "Launcher",
    "Owner",
    "PodSettings",
    "SecretKeys",
    "Toleration",
    "TrainingJob",
    "TrainingJobRequest",
    "pods_reach",
]

ARGO = "argoproj.io/v1alpha1"
"""The API of Argo's workflows."""
QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"
"""The Kubernetes quantities that are useful for memory."""
SPEC_HASH = "srccore.dev/spec-hash"
"""The annotation that identifies a job."""
TRAINING_RUNTIME = "srccore-training"
"""The TrainingRuntime that a TrainJob refers to."""
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
CA_FOLDER = "/etc/srccore/ca"
CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")
NO_SIDECAR = {"sidecar.istio.io/inject": "false"}
"""A label for pods: where Istio is enabled, as in Kubeflow's profiles, its proxy would outlive the
training and block connections between the pods of a job."""
GRACE_SECONDS = 60
"""Time between SIGTERM and SIGKILL; torchrun needs less than half of it to stop its processes."""


def pods_reach(checkpoint: str) -> bool:
    """Whether pods find a checkpoint: in their image, a bucket, their cache or the model hub.

    Args:
        checkpoint: As `srccore.config.TextModelConfig` names it.
    """
    if checkpoint.startswith(("embedded:", "s3://", f"{CACHE}/")):
        return True
    return bool(_HUB_ID.fullmatch(checkpoint))


class Toleration(Section):
    """A toleration, with the field names of Kubernetes."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class SecretKeys(Section):
    """Environment variables from a Secret; neither pipeline nor job contains their values."""

    name: str
    keys: dict[str, str]
    """Environment variable by the Secret's key."""


class CaBundle(Section):
    """A ConfigMap with all certificates to trust, including the public ones."""

    config_map: str
    key: str = "ca-bundle.crt"


class Owner(Section):
    """The Argo Workflow that owns a job: Kubernetes deletes the job along with its owner."""

    name: str
    uid: str


class PodSettings(Section):
    """What the pods of a pipeline's tasks and those of its training jobs have in common."""

    accelerator: str = "nvidia.com/gpu"
    """The extended resource for GPUs."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Of pods that request a GPU; a run may override it, and the tolerations."""
    image_pull_secrets: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    """A proxy, ``AWS_ENDPOINT_URL``, ``AWS_REGION``. No secrets."""
    ca_bundle: CaBundle | None = None
    cache_claim: str | None = None
    """A PersistentVolumeClaim (ReadWriteMany, writable for the user) for models and data; None
    gives each pod an emptyDir."""


class TrainingJob(Section):
    """A training stage as a job; in a profile, its pods request the resources of the stage."""

    pods: int = Field(default=1, ge=1)
    queue: str | None = None
    """Kueue's LocalQueue."""
    priority_class: str | None = None
    service_account: str | None = None
    """Of the pods, which do not use the API server; None means the namespace's default."""
    waiting_hours: float = Field(default=24, gt=0)
    """How long the job may wait in total, in the queue and for nodes. The stage's timeout limits
    how long it may run."""
    max_restarts: int = Field(default=10, ge=0)
    """How many lost pods are replaced in total; preemption is the usual cause."""
    ttl_hours: float = Field(default=24, gt=0)
    """Time until a finished PyTorchJob is deleted with its pods and their logs."""


class JobSettings(PodSettings, TrainingJob):
    """The pods of a training job, and how long they may take."""

    image: str
    cpu: str = Field(default="1", pattern=r"^[0-9]+(\.[0-9]+)?m?$")
    """Request of each pod; there is no limit."""
    memory: str = Field(default="4Gi", pattern=QUANTITY)
    """Request and limit of each pod."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of each pod, which runs one process per GPU, or a single one without GPUs."""
    shared_memory: str | None = Field(default=None, pattern=QUANTITY)
    """Size of ``/dev/shm``, which counts as memory; None keeps the runtime's 64 MiB."""
    tolerations: tuple[Toleration, ...] = ()
    secrets: tuple[SecretKeys, ...] = ()
    run_as_user: int = Field(default=USER_ID, ge=1)
    running_hours: float = Field(default=48, gt=0)
    """How long it may run, from the moment when all pods are running."""

    @property
    def processes(self) -> int:
        """Processes in each pod."""
        return max(1, self.gpus)


class TrainingJobRequest(Section):
    """The training of a stage as a job: all that is known without a cluster."""

    stage: str
    run: str = Field(pattern=r"^[a-z0-9]{1,12}$")
    """A short name of the run."""
    round_number: int = Field(default=1, ge=0)
    namespace: str
    task: str
    """The argument of `srccore.cluster.entry`, in JSON."""
    settings: JobSettings
    owner: Owner | None = None

    def name(self, attempt: int) -> str:
        """The job's name: a DNS label, short enough for its pods' names to be DNS labels, too."""
        short = self.stage.removeprefix("train-")
        return f"src-{short}-{self.run}-r{self.round_number}-a{attempt}"

    def to_object(self, launcher: Launcher, attempt: int) -> dict[str, Any]:
        """Writes the job for a launcher.

        Args:
            launcher: Which operator runs the job.
            attempt: Counts from 1.

        Returns:
            The object to create.
        """
        labels, spec = self.labels(), launcher.spec(self)
        if self.settings.queue:
            labels["kueue.x-k8s.io/queue-name"] = self.settings.queue
        identity = [launcher.api_version, launcher.kind, labels, spec]
        metadata: dict[str, Any] = {
            "name": self.name(attempt),
            "namespace": self.namespace,
            "labels": labels,
            "annotations": {SPEC_HASH: hash_text(json.dumps(identity, sort_keys=True))[:32]},
        }
        if self.owner:
            workflow = {"apiVersion": ARGO, "kind": "Workflow", **self.owner.model_dump()}
            metadata["ownerReferences"] = [workflow]
        return {
            "apiVersion": launcher.api_version,
            "kind": launcher.kind,
            "metadata": metadata,
            "spec": spec,
        }

    def labels(self) -> dict[str, str]:
        """The labels of the job and of its pods."""
        return {
            "app.kubernetes.io/part-of": "srccore",
            "app.kubernetes.io/component": self.stage,
            "srccore.dev/run": self.run,
            "srccore.dev/round": str(self.round_number),
        }

    def pod(self, container: str) -> dict[str, Any]:
        """The spec of each pod.

        Args:
            container: The name that the operator expects of the container.
        """
        settings = self.settings
        pod = {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": settings.run_as_user,
                "runAsGroup": settings.run_as_user,
                # Makes a claim writable for the user.
                "fsGroup": settings.run_as_user,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [self._container(container)],
            "volumes": [{"name": name, **source} for name, source, _ in self._volumes()],
        }
        chosen = {
            "serviceAccountName": settings.service_account,
            "priorityClassName": settings.priority_class,
            "nodeSelector": dict(settings.node_selector),
            "tolerations": [each.model_dump(exclude_none=True) for each in settings.tolerations],
            "imagePullSecrets": [{"name": name} for name in settings.image_pull_secrets],
        }
        return pod | {name: value for name, value in chosen.items() if value}

    def _container(self, name: str) -> dict[str, Any]:
        settings = self.settings
        limits = {"memory": settings.memory}
        if settings.gpus:
            limits[settings.accelerator] = str(settings.gpus)
        return {
            "name": name,
            "image": settings.image,
            "command": ["python3", "-m", "srccore.cluster.entry"],
            "args": [
                *("--pods", str(settings.pods)),
                *("--processes", str(settings.processes)),
                *("--restarts", str(settings.max_restarts)),
                # The step that watches the job gives up earlier; without it, the pod ends itself.
                *("--patience", str(round(settings.waiting_hours * 3600))),
                *("--task", _literal(self.task)),
            ],
            "env": self._environment(),
            "resources": {"requests": {**limits, "cpu": settings.cpu}, "limits": limits},
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            },
            "volumeMounts": [
                {"name": name, "mountPath": path} for name, _, path in self._volumes()
            ],
        }

    def _environment(self) -> list[dict[str, Any]]:
        given = dict(self.settings.environment)
        if self.settings.ca_bundle:
            given |= dict.fromkeys(CA_VARIABLES, f"{CA_FOLDER}/{self.settings.ca_bundle.key}")
        return [
            *({"name": name, "value": _literal(given[name])} for name in sorted(given)),
            *(
                {
                    "name": variable,
                    "valueFrom": {"secretKeyRef": {"name": secret.name, "key": key}},
                }
                for secret in self.settings.secrets
                for key, variable in sorted(secret.keys.items())
            ),
        ]

    def _volumes(self) -> list[tuple[str, dict[str, Any], str]]:
        """Volumes: their names, what they are, and where they are mounted."""
        settings = self.settings
        claim = {"persistentVolumeClaim": {"claimName": settings.cache_claim}}
        volumes: list[tuple[str, dict[str, Any], str]] = [
            ("tmp", {"emptyDir": {}}, "/tmp"),
            ("cache", claim if settings.cache_claim else {"emptyDir": {}}, CACHE),
        ]
        if settings.shared_memory:
            memory = {"emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}}
            volumes.append(("shared-memory", memory, "/dev/shm"))
        if settings.ca_bundle:
            bundle = {"configMap": {"name": settings.ca_bundle.config_map}}
            volumes.append(("ca-bundle", bundle, CA_FOLDER))
        return volumes


def _literal(text: str) -> str:
    """Keeps the kubelet from replacing ``$(NAME)``, which may be a key, by the variable's value."""
    return text.replace("$", "$$")


@dataclass(frozen=True)
class Launcher:
    """Runs a stage as a job of one operator: the job's API, how it is written, what it refuses.

    Attributes:
        name: What profiles and pipelines call it.
        kind: The kind of its jobs.
        group: Their API group.
        version: Their API version.
        plural: The name of the kind in paths.
        operator: What to install.
        job_label: The label of a pod that names its job.
        index_label: The label of a pod that numbers the pods of a job from 0.
        container: The name of the pods' container.
        succeeded: The condition of a job that has succeeded.
        spec: Writes the spec of a job.
        maker: Suffix that turns a job's name into the name of the object that creates its pods.
        unsupported: Fields of `JobSettings` that its jobs have no field for.
        instead: Where to set those.
    """

    name: str
    kind: str
    group: str
    version: str
    plural: str
    operator: str
    job_label: str
    index_label: str
    container: str
    succeeded: str
    spec: Callable[[TrainingJobRequest], dict[str, Any]]
    maker: str = ""
    unsupported: tuple[str, ...] = ()
    instead: str = ""

    @property
    def api_version(self) -> str:
        """Group and version, as objects name them."""
        return f"{self.group}/{self.version}"

    def check(self, source: str, settings: Mapping[str, Any]) -> None:
        """Refuses settings that its jobs have no field for.

        Args:
            source: Where the settings come from, to begin the message: ``The profile``.
            settings: Fields of `JobSettings`, and perhaps others.

        Raises:
            UserError: An unsupported field is set, and not to its default.
        """
        defaults = JobSettings.model_fields
        found = [
            name
            for name in self.unsupported
            if settings.get(name) and settings[name] != defaults[name].default
        ]
        if found:
            names = " and ".join(found)
            raise UserError(
                f"{source} sets {names}, which a {self.kind} has no field for "
                f"(launcher: {self.name}).",
                f"Remove {names} there and set it in {self.instead}.",
            )


def _pytorchjob(request: TrainingJobRequest) -> dict[str, Any]:
    """A PyTorchJob of workers only, with an elastic policy.

    The operator adds no init container to such a job, so its pods pass ``restricted``, and a lost
    worker leads to a new rendezvous instead of a dead job.
    """
    settings = request.settings
    return {
        "nprocPerNode": str(settings.processes),
        "elasticPolicy": {
            "rdzvBackend": "c10d",
            "minReplicas": settings.pods,
            "maxReplicas": settings.pods,
            "maxRestarts": settings.max_restarts,
        },
        "runPolicy": {
            "cleanPodPolicy": "Running",
            "ttlSecondsAfterFinished": round(settings.ttl_hours * 3600),
        },
        "pytorchReplicaSpecs": {
            "Worker": {
                "replicas": settings.pods,
                # 1 to 127 ends the job; from 128 on (signals) the pod is recreated.
                "restartPolicy": "ExitCode",
                "template": {
                    "metadata": {"labels": request.labels() | NO_SIDECAR},
                    "spec": request.pod(PYTORCHJOB.container),
                },
            }
        },
    }


def _trainjob(request: TrainingJobRequest) -> dict[str, Any]:
    """A TrainJob; without ``trainer`` its pods would get no ``PET_*`` and train alone."""
    settings, pod = request.settings, request.pod(TRAINJOB.container)
    container = pod["containers"][0]
    moved = ("serviceAccountName", "nodeSelector", "tolerations", "volumes", "imagePullSecrets")
    mounts = {"name": TRAINJOB.container, "volumeMounts": container["volumeMounts"]}
    return {
        "runtimeRef": {
            "apiGroup": TRAINJOB.group,
            "kind": "TrainingRuntime",
            "name": TRAINING_RUNTIME,
        },
        "trainer": {
            "image": settings.image,
            "command": container["command"],
            "args": container["args"],
            "env": container["env"],
            "numNodes": settings.pods,
            "numProcPerNode": settings.processes,
            "resourcesPerNode": container["resources"],
        },
        "podTemplateOverrides": [
            {
                "targetJobs": [{"name": TRAINJOB.container}],
                "metadata": {"labels": request.labels() | NO_SIDECAR},
                "spec": {
                    **{name: pod[name] for name in moved if name in pod},
                    "containers": [mounts],
                },
            }
        ],
    }


PYTORCHJOB = Launcher(
    name="pytorchjob",
    kind="PyTorchJob",
    group="kubeflow.org",
    version="v1",
    plural="pytorchjobs",
    operator="the Training Operator (1.9 or later of the 1.x series)",
    job_label="training.kubeflow.org/job-name",
    index_label="training.kubeflow.org/replica-index",
    container="pytorch",
    succeeded="Succeeded",
    spec=_pytorchjob,
)
TRAINJOB = Launcher(
    name="trainjob",
    kind="TrainJob",
    group="trainer.kubeflow.org",
    version="v1alpha1",
    plural="trainjobs",
    operator="Kubeflow Trainer 2.1 with JobSet",
    job_label="jobset.sigs.k8s.io/jobset-name",
    index_label="batch.kubernetes.io/job-completion-index",
    container="node",
    succeeded="Complete",
    spec=_trainjob,
    maker="-node-0",
    unsupported=("priority_class", "run_as_user"),
    instead=f"the TrainingRuntime {TRAINING_RUNTIME}",
)
LAUNCHERS = {each.name: each for each in (PYTORCHJOB, TRAINJOB)}
INPROCESS = "inprocess"
"""The launcher that creates no job: the stage trains in the pod of its step."""
