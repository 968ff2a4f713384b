"""Plays operator and kubelet on a cluster that has neither: moves a PyTorchJob as a test demands.

It does to a job and its pods what the Training Operator 1.9 does (controller.v1/common and
controller.v1/pytorch: labels, names, conditions, events), one step at a time. Pods have no node, so
they disappear at once when they are deleted. `PodLogs` serves their logs instead of the API server.
"""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import time
from datetime import UTC, datetime
from typing import Any

from kubernetes import client

from .clusters import Cluster
from .proxy import PATIENCE, Exchange, answer

Object = dict[str, Any]

JOBS = "/apis/kubeflow.org/v1/namespaces/{}/pytorchjobs"
LABELS = "training.kubeflow.org/"


class Administrator:
    """Plain requests to the API server, by a user with all permissions."""

    def __init__(self, cluster: Cluster) -> None:
        self._client = client.ApiClient(
            configuration(cluster.server, cluster.token, str(cluster.ca))
        )

    def ask(self, method: str, path: str, body: Object | None = None, **query: str) -> Object:
        """Raises ApiException if it is refused."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        found = self._client.call_api(
            path,
            method,
            query_params=list(query.items()),
            header_params={"Accept": "application/json", "Content-Type": kind},
            body=body,
            auth_settings=["BearerToken"],
            response_type="object",
            _return_http_data_only=True,
        )
        return dict(found)

    def delete(self, path: str) -> None:
        """Deletes something that may be gone already."""
        try:
            self.ask("DELETE", path, {"gracePeriodSeconds": 0})
        except client.ApiException as error:
            if error.status != 404:
                raise

    def is_there(self, path: str) -> bool:
        try:
            self.ask("GET", path)
        except client.ApiException as error:
            if error.status == 404:
                return False
            raise
        return True


def configuration(server: str, token: str, ca: str | None = None) -> client.Configuration:
    """The configuration of a client: no proxies, no retries of its own."""
    settings = client.Configuration()
    settings.host, settings.retries, settings.proxy = server, False, None
    settings.api_key = {"authorization": f"Bearer {token}"}
    settings.ssl_ca_cert = ca
    return settings


class JobController:
    """Moves one job.

    Args:
        admin: Sends requests to the API server.
        namespace: The namespace of the job.
        name: The name of the job.
        logs: Gets the logs of the pods.
    """

    def __init__(self, admin: Administrator, namespace: str, name: str, logs: PodLogs) -> None:
        self.admin = admin
        self.name = name
        self.logs = logs
        self.path = f"{JOBS.format(namespace)}/{name}"
        self._core = f"/api/v1/namespaces/{namespace}"

    # The operator

    def take_up(self) -> None:
        """What the operator does first."""
        self.condition("Created")

    def make_pods(self, init_container: bool = False) -> None:
        """Creates the missing pods of the job; if that is refused, an event says why.

        Args:
            init_container: Adds what the operator adds to pods of jobs with a master.
        """
        job = self.admin.ask("GET", self.path)
        worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
        template = worker["template"]
        if init_container:
            template["spec"]["initContainers"] = [{"name": "init-pytorch", "image": "alpine:3.10"}]
        for index in range(worker["replicas"]):
            if not self.admin.is_there(self._pod_path(index)):
                self._make_pod(job, template, index)

    def lose(self, index: int, code: int = 143) -> None:
        """A pod ends in a way after which it is recreated."""
        self.end(index, code)
        self.remove_pod(index)
        self.condition("Restarting", drops="Running")
        self.make_pods()

    def succeed(self) -> None:
        self.condition("Succeeded")

    def fail(self) -> None:
        self.condition("Failed", message=f'job "{self.name}" is failing because pods failed.')

    def suspend(self) -> None:
        self.condition("Suspended")

    def remove(self) -> None:
        """The job's TTL is over, or somebody deletes it."""
        self.admin.delete(self.path)

    def condition(self, name: str, drops: str = "", message: str = "") -> None:
        """Sets a condition."""
        found = self.admin.ask("GET", self.path).get("status", {}).get("conditions") or []
        new = {
            "type": name,
            "status": "True",
            "reason": f"PyTorchJob{name}",
            "message": message or f"PyTorchJob {self.name} is {name}.",
            "lastTransitionTime": _second(),
            "lastUpdateTime": _second(),
        }
        kept = [each for each in found if each["type"] not in (name, drops)]
        status = {"conditions": [*kept, new]}
        self.admin.ask("PATCH", f"{self.path}/status", {"status": status})

    def warn(self, reason: str, message: str, of: Object | None = None) -> None:
        """Writes a warning about the job, or about another object."""
        thing = of or self.admin.ask("GET", self.path)
        event = {
            "metadata": {"generateName": f"{self.name}."},
            "involvedObject": {
                "apiVersion": thing["apiVersion"],
                "kind": thing["kind"],
                "namespace": thing["metadata"]["namespace"],
                "name": thing["metadata"]["name"],
                "uid": thing["metadata"]["uid"],
            },
            "type": "Warning",
            "reason": reason,
            "message": message,
            "count": 1,
            "firstTimestamp": _second(),
            "lastTimestamp": _second(),
            "source": {"component": "pytorchjob-controller"},
        }
        self.admin.ask("POST", f"{self._core}/events", event)

    def _make_pod(self, job: Object, template: Object, index: int) -> None:
        labels = {
            f"{LABELS}job-name": self.name,
            f"{LABELS}operator-name": "pytorchjob-controller",
            f"{LABELS}replica-type": "worker",
            f"{LABELS}replica-index": str(index),
        }
        owner = {
            "apiVersion": job["apiVersion"],
            "kind": job["kind"],
            "name": self.name,
            "uid": job["metadata"]["uid"],
            "controller": True,
        }
        pod = {
            "metadata": {
                "name": self.pod(index),
                "labels": {**template["metadata"]["labels"], **labels},
                "ownerReferences": [owner],
            },
            "spec": {**template["spec"], "restartPolicy": "Never"},
        }
        try:
            self.admin.ask("POST", f"{self._core}/pods", pod)
        except client.ApiException as error:
            message = json.loads(error.body)["message"]
            self.warn("FailedCreatePod", f"Error creating: {message}", job)

    # The kubelet, and the scheduler

    def pod(self, index: int) -> str:
        """A pod's name."""
        return f"{self.name}-worker-{index}"

    def find_no_node(self, index: int, message: str) -> None:
        """The scheduler reports about a pod."""
        condition = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": message,
        }
        self._set_pod(index, {"phase": "Pending", "conditions": [condition]})

    def warn_of_pod(self, index: int, reason: str, message: str) -> None:
        """Writes a warning about a pod."""
        self.warn(reason, message, self.admin.ask("GET", self._pod_path(index)))

    def wait(self, index: int, reason: str, message: str = "") -> None:
        """A pod's container waits."""
        state = {"waiting": {"reason": reason, "message": message}}
        self._set_container(index, "Pending", state)

    def run(self, *indices: int) -> None:
        """Pods are running, and so is the job."""
        for index in indices:
            self.logs.begin(self.pod(index))
            self._set_container(index, "Running", {"running": {"startedAt": _second()}})
        self.condition("Running", drops="Restarting")

    def end(self, index: int, code: int, reason: str = "", at: str = "") -> None:
        """A pod's container terminates; now, unless a time is given."""
        state = {
            "exitCode": code,
            "reason": reason or ("Error" if code else "Completed"),
            "startedAt": _second(),
            "finishedAt": at or _second(),
        }
        phase = "Failed" if code else "Succeeded"
        self._set_container(index, phase, {"terminated": state})
        self.logs.end(self.pod(index))

    def remove_pod(self, index: int) -> None:
        self.logs.forget(self.pod(index))
        self.admin.delete(self._pod_path(index))

    def _set_container(self, index: int, phase: str, state: Object) -> None:
        container = {
            "name": "pytorch",
            "image": "image",
            "imageID": "",
            "ready": "running" in state,
            "restartCount": 0,
            "state": state,
        }
        self._set_pod(index, {"phase": phase, "containerStatuses": [container]})

    def _set_pod(self, index: int, status: Object) -> None:
        self.admin.ask("PATCH", f"{self._pod_path(index)}/status", {"status": status})

    def _pod_path(self, index: int) -> str:
        return f"{self._core}/pods/{self.pod(index)}"


class PodLogs:
    """The logs of containers, as the kubelet would serve them: a rule of the proxy."""

    def __init__(self) -> None:
        self._logs: dict[str, _Log] = {}
        self._changed = threading.Condition()

    def begin(self, pod: str) -> None:
        """The pod's container starts."""
        self._logs.setdefault(pod, _Log())

    def say(self, pod: str, *texts: str) -> None:
        """It logs some lines."""
        with self._changed:
            self._logs[pod].lines += [(f"{_now()}Z", text) for text in texts]
            self._changed.notify_all()

    def end(self, pod: str) -> None:
        """It terminates: its followers have received everything."""
        self.begin(pod)
        with self._changed:
            self._logs[pod].ended = True
            self._changed.notify_all()

    def forget(self, pod: str) -> None:
        """The pod is gone; another one may get its name."""
        self.end(pod)
        del self._logs[pod]

    def __call__(self, exchange: Exchange) -> None:
        """Responds to a request for a log."""
        found = re.search(r"/pods/([^/]+)/log$", exchange.request.path)
        assert found is not None
        log, query = self._logs.get(found[1]), exchange.request.query
        if log is None:
            say = f'container "pytorch" in pod "{found[1]}" is waiting to start'
            answer(400, "BadRequest", say)(exchange)
            return
        exchange.begin(kind="text/plain")
        told = max(0, len(log.lines) - int(query["tailLines"])) if "tailLines" in query else 0
        while new := self._after(told, log, follows=query.get("follow") == "true"):
            told += len(new)
            for time_stamp, text in new:
                # With a resolution of seconds, like the kubelet's: it may start earlier.
                if time_stamp[:19] >= query.get("sinceTime", "")[:19]:
                    line = f"{time_stamp} {text}" if query.get("timestamps") == "true" else text
                    exchange.line(f"{line}\n".encode())
        exchange.end()

    def _after(self, told: int, log: _Log, follows: bool) -> list[tuple[str, str]]:
        """The lines that are left to send; none at the end."""
        with self._changed:
            while follows and len(log.lines) == told and not log.ended:
                self._changed.wait(PATIENCE)
            return log.lines[told:]


@dataclasses.dataclass
class _Log:
    lines: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    ended: bool = False


def _now() -> str:
    """The time with nanoseconds; the API server's own times are shorter."""
    seconds, rest = divmod(time.time_ns(), 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}"


def _second() -> str:
    return f"{_now()[:19]}Z"
