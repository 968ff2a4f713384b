"""Training jobs as they are written for their operators.

``SRCCORE_WRITE_GOLDENS=1`` writes the files that jobs are compared with.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from srccore.cluster.request import (
    INPROCESS,
    LAUNCHERS,
    PYTORCHJOB,
    SPEC_HASH,
    TRAINING_RUNTIME,
    TRAINJOB,
    CaBundle,
    JobSettings,
    Launcher,
    Owner,
    SecretKeys,
    Toleration,
    TrainingJobRequest,
)
from srccore.errors import UserError
from srccore.stages.table import STAGES

GOLDENS = Path(__file__).parent / "goldens" / "jobs"
RUNTIME = Path(__file__).parents[3] / "manifests/components/trainjob/training-runtime.yaml"
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
"""What the name of a Service must be; the operator creates a Service for each pod."""

LEAST = JobSettings(image="registry.example.com/srccore/train-dpo:0.1.0")
MOST = JobSettings(
    image="registry.example.com/srccore/train-dpo:0.1.0",
    pods=2,
    cpu="7500m",
    memory="120Gi",
    gpus=8,
    shared_memory="16Gi",
    node_selector={"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"},
    tolerations=(
        Toleration(key="nvidia.com/gpu", effect="NoSchedule"),
        Toleration(key="spot", operator="Equal", value="true"),
    ),
    environment={"AWS_ENDPOINT_URL": "https://s3.example.com", "AWS_DEFAULT_REGION": "x"},
    secrets=(
        SecretKeys(name="s3", keys={"secret": "AWS_SECRET_ACCESS_KEY", "key": "AWS_ACCESS_KEY_ID"}),
    ),
    image_pull_secrets=("registry",),
    ca_bundle=CaBundle(config_map="trusted"),
    cache_claim="models",
    run_as_user=1234,
    service_account="srccore-training",
    queue="gpus",
    priority_class="training",
    running_hours=12,
    max_restarts=3,
    ttl_hours=0.5,
)
OWNER = Owner(name="src-x7", uid="u-1")
BOTH = pytest.mark.parametrize("launcher", [PYTORCHJOB, TRAINJOB], ids=lambda each: each.name)


def request(settings: JobSettings = LEAST, **fields: Any) -> TrainingJobRequest:
    known = {
        "stage": "train-dpo",
        "run": "1a2b3c4d",
        "round_number": 2,
        "namespace": "srccore",
        "task": '{"stage": "train-dpo"}',
        "settings": settings,
    }
    return TrainingJobRequest.model_validate(known | fields)


def hash_of(of: TrainingJobRequest, launcher: Launcher = PYTORCHJOB, attempt: int = 1) -> str:
    return str(of.to_object(launcher, attempt)["metadata"]["annotations"][SPEC_HASH])


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    return spec


@pytest.mark.parametrize(
    ("name", "of"),
    [("least", request(LEAST)), ("most", request(MOST, owner=OWNER))],
    ids=["least", "most"],
)
@BOTH
def test_a_job_is_what_was_read_over(launcher: Launcher, name: str, of: TrainingJobRequest) -> None:
    path = GOLDENS / f"{launcher.kind.lower()}-{name}.yaml"
    found = of.to_object(launcher, 3)
    if os.environ.get("SRCCORE_WRITE_GOLDENS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(found, sort_keys=True), encoding="utf-8")
    assert found == yaml.safe_load(path.read_text(encoding="utf-8"))
    assert found == json.loads(json.dumps(found))


def test_a_proxy_with_a_password_is_refused() -> None:
    with pytest.raises(ValidationError, match="a URL must not have a user name or password"):
        JobSettings(image="i", environment={"HTTPS_PROXY": "http://ann:s3cret@proxy:3128"})


def expanded(text: str, environment: dict[str, str]) -> str:
    """What the kubelet makes of an argument or a value: ``expansion.Expand`` of Kubernetes."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda found: (
            "$" if found[0] == "$$" else environment.get(found[1], found[0])  # type: ignore[arg-type]
        ),
        text,
    )


@BOTH
@pytest.mark.parametrize("text", ["$(KEY)", "$$(KEY)", "$$$(KEY)", "$", "a$$b", "$(", "^x$(y|z)$"])
def test_no_text_pulls_a_secret_into_a_job(launcher: Launcher, text: str) -> None:
    task = json.dumps({"settings": text})
    settings = LEAST.model_copy(update={"environment": {"TEXT": text}})
    spec = request(settings, task=task).to_object(launcher, 1)["spec"]
    found = spec["trainer"] if launcher is TRAINJOB else pod_of({"spec": spec})["containers"][0]
    (value,) = (each["value"] for each in found["env"] if each["name"] == "TEXT")
    assert expanded(value, {"KEY": "secret"}) == text
    assert expanded(found["args"][-1], {"KEY": "secret"}) == task


@pytest.mark.parametrize(
    ("launcher", "fields", "refused"),
    [
        (PYTORCHJOB, {"priority_class": "p", "run_as_user": 7}, None),
        (TRAINJOB, {"queue": "q"}, None),
        (TRAINJOB, {"priority_class": "p"}, "sets priority_class, which a TrainJob"),
        (TRAINJOB, {"priority_class": "p", "run_as_user": 7}, "priority_class and run_as_user"),
    ],
)
def test_a_launcher_refuses_what_its_jobs_have_no_field_for(
    launcher: Launcher, fields: dict[str, Any], refused: str | None
) -> None:
    settings = dict(LEAST.model_copy(update=fields))
    if refused is None:
        launcher.check("The profile", settings)
        return
    with pytest.raises(UserError, match=f"{refused}.*TrainingRuntime srccore-training"):
        launcher.check("The profile", settings)


def test_launchers_are_found_by_their_names() -> None:
    assert all(name == each.name for name, each in LAUNCHERS.items())
    assert INPROCESS not in LAUNCHERS


# The hash: what makes a different job, and what is another attempt at the same job


@BOTH
def test_the_hash_is_that_of_the_specification_alone(launcher: Launcher) -> None:
    one = hash_of(request(), launcher)
    assert one == hash_of(request(), launcher, attempt=7)
    assert one == hash_of(request(owner=OWNER), launcher)
    assert one == hash_of(request(owner=OWNER.model_copy(update={"uid": "u-2"})), launcher)
    assert re.fullmatch(r"[0-9a-f]{32}", one)


@BOTH
@pytest.mark.parametrize(
    "change",
    [
        {"image": "registry.example.com/srccore/train-dpo:0.2.0"},
        {"pods": 2},
        {"memory": "8Gi"},
        {"gpus": 1},
        {"environment": {"A": "b"}},
        {"queue": "gpus"},
        {"tolerations": (Toleration(key="spot"),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_specification_has_another_hash(launcher: Launcher, change: dict[str, Any]) -> None:
    other = request(LEAST.model_copy(update=change))
    assert hash_of(request(), launcher) != hash_of(other, launcher)


@pytest.mark.parametrize("field", ["task", "run", "stage"])
def test_another_task_has_another_hash(field: str) -> None:
    assert hash_of(request()) != hash_of(request(**{field: "other"}))


def test_the_two_kinds_have_different_hashes() -> None:
    assert hash_of(request(), PYTORCHJOB) != hash_of(request(), TRAINJOB)


# Names


@pytest.mark.parametrize("stage", [name for name, stage in STAGES.items() if stage.trains])
@BOTH
def test_names_of_jobs_and_pods_are_labels(launcher: Launcher, stage: str) -> None:
    of = request(stage=stage, run="a" * 12, round_number=9999)
    name = of.to_object(launcher, 9999)["metadata"]["name"]
    # Trainer adds five random letters to the names of its pods.
    last = {"PyTorchJob": "-worker-999", "TrainJob": "-node-0-999-xxxxx"}[launcher.kind]
    assert DNS_LABEL.fullmatch(f"{name}{last}")


def test_stage_run_round_and_attempt_are_in_the_name() -> None:
    assert request().name(3) == "src-dpo-1a2b3c4d-r2-a3"
    made = itertools.product(("train-dpo", "train-scorer"), ("a", "b"), (1, 2), (1, 2))
    names = {request(stage=s, run=r, round_number=n).name(a) for s, r, n, a in made}
    assert len(names) == 16


@pytest.mark.parametrize("run", ["", "A1", "a-b", "a" * 13])
def test_a_run_that_would_make_no_label_is_refused(run: str) -> None:
    with pytest.raises(ValidationError, match="run"):
        request(run=run)


# Pods


@pytest.mark.parametrize("settings", [LEAST, MOST], ids=["least", "most"])
def test_pods_are_what_restricted_asks_for(settings: JobSettings) -> None:
    pod = pod_of(request(settings).to_object(PYTORCHJOB, 1))
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] >= 1
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"emptyDir", "configMap", "persistentVolumeClaim"}
    mounted = [mount["name"] for mount in container["volumeMounts"]]
    assert mounted == [volume["name"] for volume in pod["volumes"]]


def test_the_runtime_of_trainjobs_gives_pods_the_same_context() -> None:
    """A TrainJob cannot set it, so it is in manifests/."""
    runtime = yaml.safe_load(RUNTIME.read_text(encoding="utf-8"))
    assert runtime["metadata"]["name"] == TRAINING_RUNTIME
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    theirs = job["template"]["spec"]["template"]["spec"]
    ours = pod_of(request().to_object(PYTORCHJOB, 1))
    assert job["name"] == TRAINJOB.container == theirs["containers"][0]["name"]
    assert TRAINJOB.maker == f"-{job['name']}-0"
    assert theirs["securityContext"] == ours["securityContext"]
    assert theirs["terminationGracePeriodSeconds"] == ours["terminationGracePeriodSeconds"]
    assert theirs["automountServiceAccountToken"] is False
    mine, its = ours["containers"][0], theirs["containers"][0]
    assert its["securityContext"] == mine["securityContext"]


def test_no_value_of_a_secret_is_in_a_job() -> None:
    pod = pod_of(request(MOST).to_object(PYTORCHJOB, 1))
    assert [each for each in pod["containers"][0]["env"] if "valueFrom" in each] == [
        {
            "name": "AWS_ACCESS_KEY_ID",
            "valueFrom": {"secretKeyRef": {"name": "s3", "key": "key"}},
        },
        {
            "name": "AWS_SECRET_ACCESS_KEY",
            "valueFrom": {"secretKeyRef": {"name": "s3", "key": "secret"}},
        },
    ]


@pytest.mark.parametrize(
    "wrong",
    [{"memory": "lots"}, {"cpu": "two"}, {"pods": 0}, {"gpus": -1}, {"run_as_user": 0}, {"gpu": 1}],
    ids=str,
)
def test_settings_that_no_pod_can_have_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        JobSettings.model_validate({"image": "x", **wrong})
