"""The training job under real operators: losses are recovered, errors are explained.

The step of train-dpo of the finished pipeline is run again, each time with another seed, so that
there is something to train. Steps that trained by themselves are run again as jobs.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.installation import ACCOUNT, NAMESPACE, Site
from cluster.pipeline_pods import Pods, Task
from kustomize import copied

from srccore.files import MANIFEST

LONG = {"epochs": 12, "checkpoint_minutes": 1e-9}
"""Long enough to remove something in the middle."""
LIMIT = 240.0
FIRST = 100
NUMBERS = itertools.count(FIRST)
"""Seeds and also rounds, since a run has one job per round."""
COMPONENT = "components: [../../components/trainjob]\n"


@pytest.fixture
def step(pods: Pods) -> Task:
    """The step of train-dpo, with something new to train."""
    (task,) = (task for task in pods.tasks if "/launch-training" in task.image)
    number = next(NUMBERS)
    return task.with_parameters(seed=number, round_number=number)


def changed(task: Task, **dpo: Any) -> Task:
    config = task.input["inputs"]["parameterValues"]["config"]
    return task.with_parameters(config={**config, **dpo})


def awaited(what: str, look: Callable[[], Any]) -> Any:
    ends = time.monotonic() + LIMIT
    while time.monotonic() < ends:
        if found := look():
            return found
        threading.Event().wait(0.2)
    raise AssertionError(f"not within {LIMIT:.0f} s: {what}")


def job_of(pods: Pods, name: str) -> str:
    """The name of the job that a step's pod created or adopted."""

    def look() -> str | None:
        for line in pods.log(name).splitlines():
            if "Job srccore/" in line and ("Created " in line or " already exists" in line):
                return line.split("srccore/")[1].split()[0]
        return None

    # Its container may not have started yet.
    return str(awaited(f"a job of {name}", lambda: _started(pods, name) and look()))


def _started(pods: Pods, name: str) -> bool:
    pod = pods.core.read_namespaced_pod(name, NAMESPACE)
    return pod.status.phase != "Pending"


def training_pods(site: Site, job: str) -> dict[str, str]:
    """The uids of a job's pods by name."""
    return {
        pod["metadata"]["name"]: pod["metadata"]["uid"]
        for pod in site.training_pods()
        if pod["metadata"]["name"].startswith(f"{job}-")
    }


def has_checkpoint(site: Site) -> bool:
    keys = site.store.keys()
    return any("/checkpoint/" in key for key in keys)


@pytest.mark.parametrize("number", [0, 1], ids=["where they meet", "another"])
def test_a_killed_worker_comes_back_and_training_goes_on(
    site: Site, pods: Pods, step: Task, number: int
) -> None:
    name = pods.start(changed(step, **LONG))
    job = job_of(pods, name)
    awaited("a checkpoint", lambda: has_checkpoint(site))
    before = training_pods(site, job)
    victim = f"{job}-worker-{number}"
    site.kubectl("delete", "pod", victim, "--grace-period=0", "--force")
    ended = pods.wait(name)
    log = pods.log(name)
    assert ended.status.phase == "Succeeded", log
    # When the job has succeeded, the operator deletes a pod that is about to exit.
    assert training_pods(site, job).get(victim) != before[victim]
    assert "pods lost so far: 1" in log


def test_a_retried_step_goes_on_with_the_running_job(site: Site, pods: Pods, step: Task) -> None:
    task = changed(step, **LONG)
    first = pods.start(task)
    job = job_of(pods, first)
    site.kubectl("delete", "pod", first, "--grace-period=0", "--force")
    awaited("both workers", lambda: len(training_pods(site, job)) == 2)
    before = training_pods(site, job)
    second = pods.start(task)
    assert job_of(pods, second) == job
    ended = pods.wait(second)
    log = pods.log(second)
    assert ended.status.phase == "Succeeded", log
    assert "already exists; this step adopts it" in log
    # The same pods; when the job has succeeded, the operator deletes one that is about to exit.
    assert training_pods(site, job).items() <= before.items()


def test_what_the_training_raises_is_in_the_steps_log(site: Site, pods: Pods, step: Task) -> None:
    config = step.input["inputs"]["parameterValues"]["config"]
    lora = {**config["lora"], "target_modules": "no_such_module"}
    name = pods.start(changed(step, lora=lora))
    ended = pods.wait(name)
    log = pods.log(name)
    assert ended.status.phase == "Failed"
    assert ended.status.container_statuses[0].state.terminated.exit_code != 0
    assert "no_such_module" in log and "exited with code 1" in log
    assert log.strip().splitlines()[-1].startswith("Error: ") or "Error: PyTorchJob" in log


def test_an_image_that_does_not_exist_is_told_within_a_minute(
    site: Site, pods: Pods, step: Task
) -> None:
    job = step.input["inputs"]["parameterValues"]["job"]
    missing = f"{site.cluster.registry}/srccore/no-such-image:1"
    name = pods.start(step.with_parameters(job={**job, "image": missing}))
    ended = pods.wait(name)
    log = pods.log(name)
    assert ended.status.phase == "Failed"
    assert "no-such-image" in log and "Check the image's name" in log
    ran = ended.status.container_statuses[0].state.terminated
    # This is what the documentation promises; it takes half of it.
    assert (ran.finished_at - ran.started_at).total_seconds() < 60
    assert "Deleted PyTorchJob" in log


@pytest.fixture
def trainer(site: Site, tmp_path: Path) -> None:
    """Trainer v2 and JobSet, and the shipped component for them."""
    site.cluster.install_trainer()
    site.kubectl("apply", "--server-side", "-k", str(copied(tmp_path, "single-node", COMPONENT)))


@pytest.mark.usefixtures("trainer")
def test_a_trainjob_trains_as_a_pytorchjob_does(site: Site, pods: Pods, step: Task) -> None:
    (task,) = (task for task in pods.tasks if "/launch-training" in task.image)
    name = pods.start(
        task.with_parameters(launcher="trainjob", artifact_root=f"{site.store.uri}/again")
    )
    ended = pods.wait(name)
    log = pods.log(name)
    assert ended.status.phase == "Succeeded", log
    assert "TrainJob srccore/" in log
    assert_same_result(site, "train-dpo", "src", "again")


@pytest.mark.parametrize("stage", ["tune-rationale", "train-scorer"])
def test_two_pods_train_stage_1_and_r_scorer_as_their_steps_do(
    site: Site, pods: Pods, step: Task, stage: str
) -> None:
    (alone,) = (task for task in pods.tasks if f"/{stage}@" in task.image)
    given = step.input["inputs"]["parameterValues"]
    of_a_job = {name: given[name] for name in ("launcher", "training_memory", "training_gpus")}
    task = Task(step.image, alone.command).with_parameters(
        **of_a_job,
        job={**given["job"], "image": alone.image},
        artifact_root=f"{site.store.uri}/jobs",
    )
    name = pods.start(task)
    ended = pods.wait(name)
    log = pods.log(name)
    assert ended.status.phase == "Succeeded", log
    assert f"Created PyTorchJob srccore/src-{stage.removeprefix('train-')}-" in log
    assert "2 pods are running" in log
    assert_same_result(site, stage, "src", "jobs")


def assert_same_result(site: Site, stage: str, *roots: str) -> None:
    """Compares what a stage made of the pipeline's seed below two roots."""
    first, again = (_figures(site, stage, root) for root in roots)
    assert again == pytest.approx(first, rel=1e-4, abs=1e-6)


def _figures(site: Site, stage: str, root: str) -> dict[str, float]:
    """All figures that are numbers, except how long it took."""
    keys = site.store.keys()
    manifests = [
        json.loads(site.store.get(key))
        for key in keys
        if key.startswith(f"{root}/{stage}/") and key.endswith(f"/{MANIFEST}")
    ]
    (figures,) = (each["figures"] for each in manifests if each["config"]["seed"] < FIRST)
    return {name: number for name, number in _numbers(figures) if "seconds" not in name}


def _numbers(figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, int | float):
            yield name, value


def test_the_role_grants_what_the_client_uses_and_no_more(site: Site, pods: Pods) -> None:
    """Must run last: each verb was needed somewhere above."""
    user = f"system:serviceaccount:{NAMESPACE}:{ACCOUNT}"
    used = set()
    for line in site.cluster.audit_log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["user"]["username"] == user:
            what = entry["objectRef"]
            name = "/".join(filter(None, [what["resource"], what.get("subresource")]))
            used.add((what.get("apiGroup", ""), name, entry["verb"]))
    role = json.loads(site.kubectl("get", "role", "srccore-launcher", "--output=json"))
    granted = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        if group != "trainer.kubeflow.org"
    }
    assert {each for each in used if each[0] != "trainer.kubeflow.org"} == granted
