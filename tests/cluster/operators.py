"""The operators that run training jobs, from their own manifests, and the kinds that they serve.

Manifests are rendered from the Go module that an operator is built from. They are changed only
where a test cluster must differ: the image contains nothing but the operator, the operator
reserves no resources, and its readiness is probed every second.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .build import group_of
from .control_plane import built
from .processes import ClusterError, wait_until
from .registry import push

if TYPE_CHECKING:
    from .clusters import Cluster

WORKFLOWS = Path(__file__).parent / "workflow.yaml"
ENTRY = "/manager"
READY_WITHIN = 120.0


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator, and the files in its module's folder.

    Args:
        name: The name of the program, and of its group.
        overlay: The overlay that kustomize renders.
        namespace: The namespace of the operator.
        deployment: The name of its Deployment.
        left_out: A line of the overlay to remove.
        example: An object that its webhook admits, relative to the module's folder or in full.
    """

    name: str
    overlay: str
    namespace: str
    deployment: str
    example: str | dict[str, Any]
    left_out: str = ""

    @property
    def source(self) -> Path:
        return group_of(self.name).source()


def _pods(container: str) -> dict[str, Any]:
    return {
        "spec": {"containers": [{"name": container, "image": "none"}], "restartPolicy": "Never"}
    }


TRAINING_OPERATOR = Operator(
    name="training-operator",
    overlay="manifests/overlays/standalone",
    namespace="kubeflow",
    deployment="training-operator",
    example={
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "example", "namespace": "default"},
        "spec": {"pytorchReplicaSpecs": {"Worker": {"template": _pods("pytorch")}}},
    },
)
JOBSET = Operator(
    name="jobset",
    overlay="config/default",
    namespace="jobset-system",
    deployment="jobset-controller-manager",
    example={
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": "example", "namespace": "default"},
        "spec": {
            "replicatedJobs": [{"name": "node", "template": {"spec": {"template": _pods("node")}}}]
        },
    },
)
TRAINER = Operator(
    name="trainer",
    overlay="manifests/overlays/manager",
    namespace="kubeflow-system",
    deployment="kubeflow-trainer-controller-manager",
    left_out="../../third-party/jobset",  # which is on the network, and already installed
    example="manifests/base/runtimes/torch_distributed.yaml",
)


def install_kinds(cluster: Cluster) -> None:
    """Installs the CRDs of PyTorchJob and Argo's Workflow."""
    jobs = TRAINING_OPERATOR.source / "manifests/base/crds/kubeflow.org_pytorchjobs.yaml"
    words = [f"--filename={file}" for file in (jobs, WORKFLOWS)]
    # On the server: the CRD is larger than the annotation that a client would add.
    cluster.kubectl("apply", "--server-side", *words)
    served = functools.partial(cluster.kubectl_succeeds, "get", "pytorchjobs,workflows")
    wait_until("the kinds are served", served)


def install(cluster: Cluster, *wanted: Operator) -> None:
    """Installs operators and waits until their webhooks admit an example of their kinds.

    Raises:
        ClusterError: One does not become ready; the message includes the logs of its pods.
    """
    for operator in wanted:
        image = push(cluster.registry, f"operators/{operator.name}", built(operator.name), ENTRY)
        objects = [_adapted(each, image) for each in _rendered(cluster, operator)]
        together = {"apiVersion": "v1", "kind": "List", "items": objects}
        cluster.kubectl("apply", "--server-side", "--filename=-", stdin=json.dumps(together))
    for operator in wanted:
        admits = functools.partial(_admits, cluster, operator)
        try:
            wait_until(f"{operator.name} is ready", admits, READY_WITHIN)
        except ClusterError as error:
            place = ("--namespace", operator.namespace)
            pods = cluster.kubectl("describe", "pods", *place)
            said = cluster.kubectl("logs", f"deployment/{operator.deployment}", "--tail=20", *place)
            raise ClusterError(f"{error}\n{pods}\n{said}") from None


def install_examples(cluster: Cluster, operator: Operator) -> None:
    """Creates the example that comes with an operator."""
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=_example(operator))


def _rendered(cluster: Cluster, operator: Operator) -> list[dict[str, Any]]:
    overlay = operator.source / operator.overlay
    if operator.left_out:
        copy = cluster.folder / "manifests" / operator.name
        shutil.rmtree(copy, ignore_errors=True)
        top = Path(operator.overlay).parts[0]
        shutil.copytree(operator.source / top, copy / top)
        overlay = copy / operator.overlay
        file = overlay / "kustomization.yaml"
        lines = file.read_text("utf-8").splitlines()
        kept = [line for line in lines if operator.left_out not in line]
        assert len(kept) == len(lines) - 1, (operator, lines)
        file.write_text("\n".join(kept), encoding="utf-8")
    # The loader in C, if available: the other one takes seconds for a megabyte.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return list(yaml.load_all(cluster.kubectl("kustomize", str(overlay)), loader))


def _adapted(manifest: dict[str, Any], image: str) -> dict[str, Any]:
    if manifest["kind"] == "Deployment":
        for container in manifest["spec"]["template"]["spec"]["containers"]:
            container["image"] = image
            container["resources"] = {}
            container["readinessProbe"] |= {"initialDelaySeconds": 0, "periodSeconds": 1}
    return manifest


def _admits(cluster: Cluster, operator: Operator) -> bool:
    words = ("create", "--dry-run=server", "-f", "-")
    return cluster.kubectl_succeeds(*words, stdin=_example(operator))


def _example(operator: Operator) -> str:
    if isinstance(operator.example, str):
        return (operator.source / operator.example).read_text("utf-8")
    return json.dumps(operator.example)
