"""The test cluster itself: its real parts work, and it leaves nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from cluster.build import group_of
from cluster.clusters import Cluster, KubectlError, Reachable
from cluster.existing import KUBECONFIG
from cluster.processes import wait_until

from srccore.cluster.request import JobSettings, TrainingJobRequest

TESTS = Path(__file__).parents[1]


@contextlib.contextmanager
def new_namespace(cluster: Reachable, **labels: str) -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex[:8]}"
    metadata = {"name": name, "labels": labels}
    create(cluster, {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    try:
        # Pods are admitted once their account exists.
        account = ("get", "serviceaccount", "default", "--namespace", name)
        wait_until("the namespace has its account", lambda: cluster.kubectl_succeeds(*account))
        yield name
    finally:
        cluster.kubectl("delete", "namespace", name, "--wait=false")


def create(cluster: Reachable, *manifests: dict[str, Any]) -> None:
    together = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
    cluster.kubectl("create", "--filename=-", stdin=json.dumps(together))


def read(cluster: Reachable, namespace: str, what: str, path: str) -> str:
    words = ("--namespace", namespace, "--ignore-not-found", f"--output=jsonpath={{{path}}}")
    return cluster.kubectl("get", what, *words)


def wait_for(cluster: Reachable, namespace: str, what: str, path: str, value: str) -> None:
    wait_until(f"{what} has {path} {value}", lambda: read(cluster, namespace, what, path) == value)


def pod(name: str, namespace: str, image: str, *words: str, **spec: Any) -> dict[str, Any]:
    container = {"name": "main", "image": image, "args": list(words)}
    container |= {"resources": spec.pop("resources", {})}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"name": name}},
        "spec": {"restartPolicy": "Never", "containers": [container], **spec},
    }


def pytorch_job(name: str, namespace: str, image: str, workers: int = 1) -> dict[str, Any]:
    container = {
        "name": "pytorch",
        "image": image,
        "args": ["wait"],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    template = {"spec": {"containers": [container]}}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "elasticPolicy": {"minReplicas": workers, "maxReplicas": workers},
            "pytorchReplicaSpecs": {"Worker": {"replicas": workers, "template": template}},
        },
    }


def run_pod(cluster: Reachable, namespace: str, *words: str) -> str:
    """Runs the probe until it exits; returns its output."""
    name = f"{words[0]}-{uuid.uuid4().hex[:8]}"
    create(cluster, pod(name, namespace, cluster.probe, *words))
    ended = ("Succeeded", "Failed")
    wait_until(
        f"{name} ends", lambda: read(cluster, namespace, f"pod/{name}", ".status.phase") in ended
    )
    return cluster.kubectl("logs", name, "--namespace", namespace).strip()


@pytest.fixture
def namespace(api_cluster: Cluster) -> Iterator[str]:
    with new_namespace(api_cluster) as name:
        yield name


@pytest.fixture
def node_namespace(node_cluster: Reachable) -> Iterator[str]:
    with new_namespace(node_cluster) as name:
        yield name


# An API server and controllers


def test_client_and_server_are_of_the_pinned_version(api_cluster: Cluster) -> None:
    told = json.loads(api_cluster.kubectl("version", "--output=json"))
    pinned = group_of("kubernetes").version
    assert {told[which]["gitVersion"] for which in ("clientVersion", "serverVersion")} == {pinned}


def test_a_second_object_over_the_quota_is_refused(api_cluster: Cluster, namespace: str) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "one", "namespace": namespace},
        "spec": {"hard": {"count/pytorchjobs.kubeflow.org": "1"}},
    }
    create(api_cluster, quota)
    hard = r".status.hard.count/pytorchjobs\.kubeflow\.org"
    wait_for(api_cluster, namespace, "quota/one", hard, "1")
    create(api_cluster, pytorch_job("first", namespace, "none"))
    with pytest.raises(KubectlError, match="exceeded quota: one"):
        create(api_cluster, pytorch_job("second", namespace, "none"))


def test_what_a_deleted_workflow_owns_is_deleted(api_cluster: Cluster, namespace: str) -> None:
    workflow = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow"}
    create(api_cluster, {**workflow, "metadata": {"name": "run", "namespace": namespace}})
    uid = read(api_cluster, namespace, "workflow/run", ".metadata.uid")
    job = pytorch_job("job", namespace, "none")
    job["metadata"]["ownerReferences"] = [{**workflow, "name": "run", "uid": uid}]
    create(api_cluster, job)
    api_cluster.kubectl("delete", "workflow", "run", "--namespace", namespace)
    wait_for(api_cluster, namespace, "pytorchjob/job", ".metadata.name", "")


def test_a_deleted_namespace_goes_with_what_is_in_it(api_cluster: Cluster) -> None:
    with new_namespace(api_cluster) as name:
        create(api_cluster, pytorch_job("job", name, "none"))
    wait_for(api_cluster, name, f"namespace/{name}", ".metadata.name", "")


def test_an_account_may_do_what_its_role_says_and_the_audit_log_tells(
    api_cluster: Cluster, namespace: str
) -> None:
    place = ("--namespace", namespace)
    api_cluster.kubectl("create", "serviceaccount", "reader", *place)
    token = api_cluster.token_for(namespace, "reader")
    list_jobs = ("get", "pytorchjobs", *place, f"--token={token}")
    with pytest.raises(KubectlError, match="cannot list resource"):
        _as_nobody(api_cluster, *list_jobs)
    role = ("--verb=list", "--resource=pytorchjobs.kubeflow.org")
    api_cluster.kubectl("create", "role", "reader", *role, *place)
    bound = ("--role=reader", f"--serviceaccount={namespace}:reader")
    api_cluster.kubectl("create", "rolebinding", "reader", *bound, *place)
    wait_until("the role counts", lambda: _succeeds(api_cluster, *list_jobs))

    entries = [json.loads(line) for line in api_cluster.audit_log.read_text().splitlines()]
    user = f"system:serviceaccount:{namespace}:reader"
    mine = [each for each in entries if each["user"]["username"] == user]
    asked = {
        (each["verb"], each["objectRef"]["resource"], each["responseStatus"]["code"])
        for each in mine
        if "objectRef" in each
    }
    assert asked == {("list", "pytorchjobs", 403), ("list", "pytorchjobs", 200)}


def _as_nobody(cluster: Cluster, *words: str) -> str:
    """kubectl with the permissions of a token in its arguments, and no others."""
    server = (f"--server={cluster.server}", f"--certificate-authority={cluster.ca}")
    return cluster.kubectl(*words, *server, f"--kubeconfig={os.devnull}")


def _succeeds(cluster: Cluster, *words: str) -> bool:
    with contextlib.suppress(KubectlError):
        _as_nobody(cluster, *words)
        return True
    return False


def test_pod_security_refuses_what_its_level_forbids(api_cluster: Cluster) -> None:
    enforce = {"pod-security.kubernetes.io/enforce": "restricted"}
    with (
        new_namespace(api_cluster, **enforce) as name,
        pytest.raises(KubectlError, match='violates PodSecurity "restricted'),
    ):
        create(api_cluster, pod("root", name, "none"))


def test_objects_outlive_a_restart_of_the_api_server(api_cluster: Cluster, namespace: str) -> None:
    create(api_cluster, pytorch_job("job", namespace, "none"))
    api_cluster.restart_api_server()
    assert read(api_cluster, namespace, "pytorchjob/job", ".metadata.name") == "job"


def test_without_its_controllers_a_namespace_gets_no_account(api_cluster: Cluster) -> None:
    api_cluster.stop("kube-controller-manager")
    try:
        assert not api_cluster.programs()["kube-controller-manager"]
        api_cluster.kubectl("create", "namespace", "no-controllers")
        account = ("get", "serviceaccount", "default", "--namespace", "no-controllers")
        assert not api_cluster.kubectl_succeeds(*account)
    finally:
        api_cluster.start("kube-controller-manager")
    wait_until("controllers work", lambda: api_cluster.kubectl_succeeds(*account))
    api_cluster.kubectl("delete", "namespace", "no-controllers", "--wait=false")


def test_two_clusters_are_apart_and_a_dead_program_is_named(
    api_cluster: Cluster, namespace: str
) -> None:
    with Cluster("api") as second:
        assert second.folder != api_cluster.folder
        assert not second.kubectl_succeeds("get", "namespace", namespace)
        (etcd,) = _pids(second.folder, "etcd")
        os.kill(etcd, signal.SIGKILL)
        wait_until("the end is noticed", lambda: "etcd exited with -9" in second.condition())
        assert f"Last lines of {second.logs / 'etcd.log'}:" in second.condition()
    assert not any(second.programs().values())


def test_the_next_cluster_removes_one_whose_process_was_killed() -> None:
    with _begun("api") as (process, folder):
        wait_until("it is up", lambda: len(_pids(folder)) == 3)
        pids = _pids(folder)
        process.kill()
    assert all(_runs(pid) for pid in pids)
    with Cluster("api"):
        assert not any(_runs(pid) for pid in pids)
        assert not folder.exists()


@contextlib.contextmanager
def _begun(size: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that starts a cluster, and the cluster's folder."""
    script = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from cluster.clusters import Cluster
cluster = Cluster({size!r})
print(cluster.folder, flush=True)
with cluster:
    sys.stdin.read()
"""
    command = [sys.executable, "-c", script]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())


def _pids(folder: Path, name: str = "*") -> list[int]:
    records = sorted((folder / "run").glob(f"{name}.json"))
    return [json.loads(record.read_text("utf-8"))["pid"] for record in records]


def _runs(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    return False


# A node. The first test covers its first `up`, which is the second one in its folder.


def test_a_node_comes_up_after_one_that_was_killed_half_way(
    request: pytest.FixtureRequest,
) -> None:
    if KUBECONFIG in os.environ:
        pytest.skip(f"the cluster that {KUBECONFIG} names is in use")
    with _begun("node") as (process, folder):
        wait_until("a pod runs", lambda: _pods_processes(folder) != [])
        before = [*_pids(folder), *_pods_processes(folder)]
        process.kill()
    assert all(_runs(pid) for pid in before)
    assert _mounted(folder) != []
    cluster = request.getfixturevalue("node_cluster")
    assert not any(_runs(pid) for pid in before)
    assert all(cluster.programs().values())


def _pods_processes(folder: Path) -> list[int]:
    """The first process of every container, as recorded by containerd."""
    tasks = folder / "containerd/state/io.containerd.runtime.v2.task/k8s.io"
    texts = [path.read_text("utf-8") for path in tasks.glob("*/init.pid")]
    return [int(text) for text in texts if text]


def _mounted(folder: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
    return [line for line in lines if f" {folder}/" in line]


def test_a_pod_runs_an_image_of_the_registry_and_its_log_is_read(
    node_cluster: Reachable, node_namespace: str
) -> None:
    assert node_cluster.probe.startswith(f"{node_cluster.registry}/probe@sha256:")
    assert run_pod(node_cluster, node_namespace, "say", "hello", "there") == "hello there"
    events = node_cluster.kubectl("get", "events", "--namespace", node_namespace)
    assert f'image "{node_cluster.probe}"' in events


@pytest.mark.parametrize("word", ["say", "env"])
def test_the_node_replaces_no_variable_in_a_training_jobs_texts(
    node_cluster: Reachable, node_namespace: str, word: str
) -> None:
    text = "$(KEY) $$(KEY) $$ $ $(KEY"
    request = TrainingJobRequest(
        stage="train-dpo",
        run="x",
        namespace=node_namespace,
        task=text,
        settings=JobSettings(image=node_cluster.probe, environment={"KEY": "secret", "TEXT": text}),
    )
    made = pod("texts", node_namespace, node_cluster.probe)
    (container,) = request.pod("main")["containers"]
    made["spec"]["containers"][0] |= {
        "args": [word, container["args"][-1]],
        "env": container["env"],
    }
    create(node_cluster, made)
    wait_for(node_cluster, node_namespace, "pod/texts", ".status.phase", "Succeeded")
    log = node_cluster.kubectl("logs", "texts", "--namespace", node_namespace)
    assert (text if word == "say" else f"TEXT={text}") in log.splitlines()


def test_a_pod_finds_another_by_the_name_of_its_service(
    node_cluster: Reachable, node_namespace: str
) -> None:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "greeter", "namespace": node_namespace},
        "spec": {"selector": {"name": "server"}, "ports": [{"port": 80, "targetPort": 8080}]},
    }
    create(node_cluster, service, pod("server", node_namespace, node_cluster.probe, "serve", "hi"))
    wait_for(node_cluster, node_namespace, "pod/server", ".status.phase", "Running")
    assert (
        run_pod(
            node_cluster,
            node_namespace,
            "get",
            f"http://greeter.{node_namespace}.svc.cluster.local",
        )
        == "200 hi"
    )


def test_the_s3_server_refuses_a_wrong_key_and_pods_reach_it(
    node_cluster: Cluster, node_namespace: str
) -> None:
    s3 = node_cluster.s3.with_new_bucket()
    s3.put("file", b"content")
    assert s3.keys() == ["file"]
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        dataclasses.replace(s3, secret="wrong").keys()
    answer = run_pod(node_cluster, node_namespace, "get", f"{s3.endpoint}/{s3.bucket}/file")
    assert answer.startswith("403 ")
    assert "AccessDenied" in answer


def test_a_pod_gets_gpus_by_limit_label_and_toleration_and_no_more_than_there_are(
    node_cluster: Cluster, node_namespace: str
) -> None:
    def with_gpus(name: str, count: int) -> dict[str, Any]:
        return pod(
            name,
            node_namespace,
            node_cluster.probe,
            "wait",
            resources={"limits": {"nvidia.com/gpu": str(count)}},
            nodeSelector={"nvidia.com/gpu.present": "true"},
            tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists"}],
        )

    create(node_cluster, with_gpus("some", 2), with_gpus("too-many", 9))
    wait_for(node_cluster, node_namespace, "pod/some", ".status.phase", "Running")
    reason = '.status.conditions[?(@.type=="PodScheduled")].reason'
    wait_for(node_cluster, node_namespace, "pod/too-many", reason, "Unschedulable")


def test_the_training_operator_refuses_a_wrong_job_and_runs_a_right_one(
    node_cluster: Reachable,
) -> None:
    enforce = {"pod-security.kubernetes.io/enforce": "restricted"}
    with new_namespace(node_cluster, **enforce) as namespace:
        job = pytorch_job("job", namespace, node_cluster.probe, workers=2)
        container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
        container[0]["name"] = "main"
        with pytest.raises(KubectlError, match=r"denied the request.*pytorch"):
            create(node_cluster, job)
        container[0]["name"] = "pytorch"
        create(node_cluster, job)
        running = '.status.conditions[?(@.type=="Running")].status'
        wait_for(node_cluster, namespace, "pytorchjob/job", running, "True")
        names = node_cluster.kubectl("get", "pods", "--output=name", "--namespace", namespace)
        assert names.split() == ["pod/job-worker-0", "pod/job-worker-1"]


def test_the_trainer_runs_a_job(node_cluster: Cluster, node_namespace: str) -> None:
    node_cluster.install_trainer()
    trainer = {"image": node_cluster.probe, "command": ["/probe"], "args": ["env"], "numNodes": 2}
    job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": "job", "namespace": node_namespace},
        "spec": {
            "runtimeRef": {"name": "torch-distributed"},
            "trainer": {**trainer, "numProcPerNode": 1},
        },
    }
    create(node_cluster, job)
    complete = '.status.conditions[?(@.type=="Complete")].status'
    wait_for(node_cluster, node_namespace, "trainjob/job", complete, "True")
    selected = ("--selector=jobset.sigs.k8s.io/jobset-name=job", "--namespace", node_namespace)
    assert "PET_NNODES=2" in node_cluster.kubectl("logs", *selected, "--tail=-1")
