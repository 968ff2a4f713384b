"""Which job is the one that was asked for, and which pods are its own: objects in, verdicts out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from srccore.cluster.ownership import difference, is_pod_of
from srccore.cluster.request import (
    PYTORCHJOB,
    TRAINJOB,
    JobSettings,
    Launcher,
    Toleration,
    TrainingJobRequest,
)

Object = dict[str, Any]
BOTH = pytest.mark.parametrize("launcher", [PYTORCHJOB, TRAINJOB], ids=lambda each: each.name)


def asked(launcher: Launcher = PYTORCHJOB) -> Object:
    request = TrainingJobRequest(
        stage="train-dpo",
        run="1a2b3c4d",
        namespace="srccore",
        task="{}",
        settings=JobSettings(
            image="registry.example.com/train-dpo:1",
            cpu="1000m",
            memory="1.5Gi",
            gpus=1,
            node_selector={"gpu": "h100"},
            tolerations=(Toleration(key="spot"),),
            environment={"AWS_REGION": "x"},
        ),
    )
    spec: Object = request.to_object(launcher, 1)["spec"]
    return spec


def template(spec: Object) -> Object:
    """The pod template of a PyTorchJob."""
    found: Object = spec["pytorchReplicaSpecs"]["Worker"]["template"]
    return found


def container(spec: Object) -> Object:
    found: Object = template(spec)["spec"]["containers"][0]
    return found


def changed(change: Callable[[Object], object], launcher: Launcher = PYTORCHJOB) -> str | None:
    """What differs after a change of what the API server has."""
    found = copy.deepcopy(asked(launcher))
    change(found)
    return difference(asked(launcher), found)


@BOTH
def test_a_job_is_the_one_that_was_asked_for(launcher: Launcher) -> None:
    assert difference(asked(launcher), asked(launcher)) is None


POD = "spec.pytorchReplicaSpecs.Worker.template.spec"


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda job: container(job).update(image="other"), f"{POD}.containers[0].image"),
        (lambda job: container(job).pop("securityContext"), f"{POD}.containers[0].securityContext"),
        (lambda job: container(job).update(envFrom=[{"x": 1}]), f"{POD}.containers[0].envFrom"),
        (lambda job: container(job)["args"].append("--more"), f"{POD}.containers[0].args[10]"),
        (lambda job: container(job)["args"].pop(), f"{POD}.containers[0].args[9]"),
        (
            lambda job: container(job)["env"].append({"name": "LD_PRELOAD", "value": "x"}),
            f"{POD}.containers[0].env[1]",
        ),
        (
            lambda job: template(job)["spec"].update(hostNetwork=True),
            f"{POD}.hostNetwork",
        ),
        (
            lambda job: template(job)["spec"].update(serviceAccountName="admin"),
            f"{POD}.serviceAccountName",
        ),
        (
            lambda job: template(job)["spec"].update(automountServiceAccountToken=True),
            f"{POD}.automountServiceAccountToken",
        ),
        (
            lambda job: template(job)["spec"]["containers"].append({"name": "b", "image": "b"}),
            f"{POD}.containers[1]",
        ),
        (
            lambda job: template(job)["spec"].update(initContainers=[{"image": "b"}]),
            f"{POD}.initContainers",
        ),
        (
            lambda job: template(job)["spec"]["nodeSelector"].update(gpu="a100"),
            f"{POD}.nodeSelector.gpu",
        ),
        (
            lambda job: container(job)["resources"]["limits"].update(memory="2Gi"),
            f"{POD}.containers[0].resources.limits.memory",
        ),
    ],
)
def test_a_job_that_runs_something_else_is_not(
    change: Callable[[Object], object], differs: str
) -> None:
    assert changed(change) == differs


@pytest.mark.parametrize(
    "change",
    [
        lambda job: job["runPolicy"].update(suspend=True),
        lambda job: template(job)["metadata"]["labels"].update(queued="yes"),
        lambda job: template(job)["metadata"].update(creationTimestamp=None),
        lambda job: template(job)["spec"]["nodeSelector"].update(flavour="spot"),
        lambda job: template(job)["spec"]["tolerations"].append({"key": "flavour"}),
        lambda job: template(job)["spec"].update(schedulingGates=[{"name": "kueue"}]),
        lambda job: container(job).update(imagePullPolicy="IfNotPresent"),
        # 1000m are 1, and 1.5 Gi are 1536 Mi.
        lambda job: container(job)["resources"]["requests"].update(cpu="1", memory="1536Mi"),
    ],
)
def test_what_queues_and_defaults_add_makes_no_difference(
    change: Callable[[Object], object],
) -> None:
    assert changed(change) is None


@pytest.mark.parametrize(
    ("override", "differs"),
    [
        ({"nodeSelector": {"flavour": "spot"}}, None),
        ({"serviceAccountName": "admin"}, "spec.podTemplateOverrides[1]"),
    ],
)
def test_overrides_of_a_trainjob_may_only_place_its_pods(
    override: Object, differs: str | None
) -> None:
    def change(job: Object) -> None:
        job["podTemplateOverrides"].append({"targetJobs": [{"name": "node"}], "spec": override})

    assert changed(change, TRAINJOB) == differs


def job(uid: str = "u-1") -> Object:
    return {"metadata": {"name": "j", "uid": uid, "creationTimestamp": "2026-03-01T12:00:00Z"}}


def pod(made: str = "2026-03-01T12:00:05Z", **owner: Any) -> Object:
    owners = [{"controller": True, **owner}] if owner else []
    return {"metadata": {"name": "p", "creationTimestamp": made, "ownerReferences": owners}}


@pytest.mark.parametrize(
    ("launcher", "found", "is_own"),
    [
        (PYTORCHJOB, pod(kind="PyTorchJob", name="j", uid="u-1"), True),
        (PYTORCHJOB, pod(kind="PyTorchJob", name="j", uid="u-0"), False),
        (PYTORCHJOB, pod(kind="PyTorchJob", name="j", uid="u-1", controller=False), False),
        (PYTORCHJOB, pod(), False),
        (TRAINJOB, pod(kind="Job", name="j-node-0", uid="u-9"), True),
        (TRAINJOB, pod(kind="Job", name="k-node-0", uid="u-9"), False),
        # Of an earlier job of that name, which is being deleted.
        (TRAINJOB, pod("2026-03-01T11:59:59Z", kind="Job", name="j-node-0", uid="u-8"), False),
        (TRAINJOB, pod(), False),
    ],
)
def test_a_pod_belongs_to_the_job_that_owns_it(
    launcher: Launcher, found: Object, is_own: bool
) -> None:
    assert is_pod_of(launcher, job(), found) is is_own
