"""A compiled pipeline's tasks as pods: what Kubeflow's driver and launcher do, without Kubeflow.

kfp's local runner walks the DAG and writes each task's input; here a pod replaces its process. The
pod is built from the pipeline's own executor specification (image, command, resources, selectors,
tolerations, secrets, volumes, labels), as by Kubeflow's driver. Artifacts, which are small files,
are copied to and from the pod through a bucket, as by Kubeflow's launcher.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from kubernetes import client, config, watch
from s3_server import S3Server

ENTRY = Path(__file__).with_name("step_entry.py")
PARAMETER = re.compile(r"\{\{\$\.inputs\.parameters\['(?:pipelinechannel--)?(\w+)'\]\}\}")
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""What Argo adds to each container (``mainContainer`` in Kubeflow's manifests): kfp-kubernetes only
sets the user."""


@dataclass
class Workflow:
    """The Workflow that would own a run's pods."""

    name: str
    uid: str
    run: str


@dataclass(frozen=True)
class Task:
    """A task as kfp's runner passes it on, with all placeholders filled in."""

    image: str
    command: list[str]

    @property
    def input(self) -> dict[str, Any]:
        """The input of kfp's executor."""
        return dict(json.loads(self.command[self._place]))

    @property
    def files(self) -> tuple[list[str], list[str]]:
        """The paths of its inputs and of its outputs."""
        return _files(self.input)

    def with_parameters(self, **values: Any) -> Task:
        """The same task, with different values of parameters."""
        told = self.input
        told["inputs"]["parameterValues"] |= values
        return self._told(told)

    def without_types(self) -> Task:
        """The same task with untyped inputs: unlike the runner, Kubeflow's driver sets no types."""
        told = self.input
        for each in told["inputs"].get("artifacts", {}).values():
            for artifact in each["artifacts"]:
                artifact["type"] = {"instanceSchema": ""}
        return self._told(told)

    def _told(self, told: dict[str, Any]) -> Task:
        command = [*self.command]
        command[self._place] = json.dumps(told)
        return Task(self.image, command)

    @property
    def _place(self) -> int:
        return self.command.index("--executor_input") + 1


@dataclass
class Pods:
    """Runs a pipeline's tasks as pods.

    Args:
        kubeconfig: The kubeconfig of the cluster.
        namespace: The namespace of the pods.
        service_account: The account that Kubeflow would run them as.
        package: The compiled pipeline.
        arguments: The parameters of the run; others have their defaults.
        store: The bucket for artifacts; pods get its keys from the profile's Secret.
    """

    kubeconfig: Path
    namespace: str
    service_account: str
    package: Path
    arguments: Mapping[str, Any]
    store: S3Server
    prefix: str = "kubeflow"
    retries: int = 1
    """Immediate retries of each task: Kubeflow retries as the profile says."""
    keys: str = "s3-credentials"
    """The Secret with which Kubeflow's own part accesses the store."""
    finished: list[dict[str, Any]] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)

    def __post_init__(self) -> None:
        spec, platform = yaml.safe_load_all(self.package.read_text(encoding="utf-8"))
        self._executors = spec["deploymentSpec"]["executors"]
        self._platform = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        inputs = spec["root"]["inputDefinitions"]["parameters"]
        self._values = {
            name: self.arguments.get(name, each.get("defaultValue"))
            for name, each in inputs.items()
        }
        settings = client.Configuration()
        config.load_kube_config(str(self.kubeconfig), client_configuration=settings)
        connection = client.ApiClient(settings)
        self.core = client.CoreV1Api(connection)
        self.custom = client.CustomObjectsApi(connection)
        self.workflow = self._make_workflow()

    def run(self, root: Path) -> None:
        """Runs the pipeline.

        Args:
            root: A folder for what Kubeflow would store; the pods use the same path.
        """
        from kfp import components, local
        from kfp.local import status, subprocess_task_handler

        pods = self

        class Handler(subprocess_task_handler.SubprocessTaskHandler):
            def run(self) -> status.Status:
                ok = pods.run_task(self.image, self.full_command)
                return status.Status.SUCCESS if ok else status.Status.FAILURE

        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root))
        pipeline = components.load_component_from_file(str(self.package))
        with (
            mock.patch.object(subprocess_task_handler, "SubprocessTaskHandler", Handler),
            (root.parent / f"{root.name}.log").open("w", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            warnings.catch_warnings(),
        ):
            # kfp warns about every image and resource that a process ignores.
            warnings.simplefilter("ignore")
            pipeline(**self.arguments)

    def run_task(self, image: str, command: list[str]) -> bool:
        """Runs one task as a pod, with retries; returns whether it succeeded."""
        task = Task(image, command).without_types()
        self.tasks.append(task)
        for _ in range(1 + self.retries):
            name = self.start(task)
            ended = self.wait(name)
            log = self.log(name)
            for path in task.files[1]:
                self._bring(path)
            if ended.status.phase == "Succeeded":
                return True
            print(f"{name} failed: {ended.status}\n{log}", file=sys.stderr)
        return False

    def start(self, task: Task) -> str:
        """Creates the pod of a task; returns its name."""
        label = next(
            name
            for name, each in self._executors.items()
            if each["container"]["image"] == task.image
        )
        for path in task.files[0]:
            self.store.put(f"{self.prefix}{path}", Path(path).read_bytes())
        pod = self.pod(label, task)
        self.core.create_namespaced_pod(self.namespace, pod)
        return str(pod["metadata"]["name"])

    def wait(self, name: str) -> Any:
        """The pod, once it has ended."""
        while True:
            stream = watch.Watch().stream(
                self.core.list_namespaced_pod,
                self.namespace,
                field_selector=f"metadata.name={name}",
                timeout_seconds=60,
            )
            for event in stream:
                pod = event["object"]
                if event["type"] == "DELETED" or pod.status.phase in ("Succeeded", "Failed"):
                    self.finished.append(client.ApiClient().sanitize_for_serialization(pod))
                    return pod

    def log(self, name: str) -> str:
        """The log of a pod so far."""
        self.logs[name] = self.core.read_namespaced_pod_log(name, self.namespace)
        return self.logs[name]

    def pod(self, label: str, task: Task) -> dict[str, Any]:
        """The pod of an executor, as Kubeflow's driver would write it."""
        container = self._executors[label]["container"]
        given = self._platform.get(label, {})
        stage = given["podMetadata"]["labels"]["app.kubernetes.io/component"]
        mounts, volumes = _volumes(given)
        moved = json.dumps(
            {
                "bucket": self.store.bucket,
                "prefix": self.prefix,
                "inputs": task.files[0],
                "outputs": task.files[1],
            }
        )
        security = {
            name: _number(value) for name, value in given.get("securityContext", {}).items()
        }
        return {
            "metadata": {
                "name": f"{self.workflow.name}-{stage}-{uuid.uuid4().hex[:6]}",
                "namespace": self.namespace,
                "labels": {
                    "workflows.argoproj.io/workflow": self.workflow.name,
                    "pipeline/runid": self.workflow.run,
                    **given["podMetadata"]["labels"],
                },
            },
            "spec": {
                "serviceAccountName": self.service_account,
                "restartPolicy": "Never",
                "activeDeadlineSeconds": int(given["activeDeadlineSeconds"]),
                "nodeSelector": self._node_selector(given),
                "tolerations": self._tolerations(given),
                "imagePullSecrets": [
                    {"name": each["secretName"]} for each in given.get("imagePullSecret", [])
                ],
                "volumes": volumes,
                "containers": [
                    {
                        "name": "main",
                        "image": container["image"],
                        "command": ["python3", "-c", ENTRY.read_text(encoding="utf-8"), moved],
                        "args": task.command,
                        "env": self._environment(container, given),
                        "resources": self._resources(container.get("resources", {})),
                        "securityContext": {**RESTRICTED, **security},
                        "volumeMounts": mounts,
                    }
                ],
            },
        }

    def _environment(self, container: dict[str, Any], given: dict[str, Any]) -> list[Any]:
        by_pod = {"fieldRef": {"fieldPath": "metadata.name"}}
        return [
            *container.get("env", []),
            {"name": "KFP_POD_NAME", "valueFrom": by_pod},
            _secret("STEP_ACCESS_KEY", self.keys, "access-key"),
            _secret("STEP_SECRET_KEY", self.keys, "secret-key"),
            *(
                _secret(each["envVar"], secret["secretName"], each["secretKey"])
                for secret in given.get("secretAsEnv", [])
                for each in secret["keyToEnv"]
            ),
        ]

    def _resources(self, asked: dict[str, Any]) -> dict[str, Any]:
        requests, limits = {}, {}
        for name, wanted in (
            ("cpu", requests),
            ("memory", requests),
        ):
            if value := asked.get(f"resource{name.capitalize()}Request"):
                wanted[name] = self._filled(value)
        if value := asked.get("resourceMemoryLimit"):
            limits["memory"] = self._filled(value)
        if accelerator := asked.get("accelerator"):
            limits[accelerator["resourceType"]] = self._filled(accelerator["resourceCount"])
        return {"requests": requests, "limits": limits}

    def _filled(self, value: str) -> str:
        return PARAMETER.sub(lambda found: str(self._values[found[1]]), value)

    def _node_selector(self, given: dict[str, Any]) -> dict[str, str]:
        selector = given.get("nodeSelector", {})
        if "nodeSelectorJson" in selector:
            return dict(self._input(selector["nodeSelectorJson"]))
        return dict(selector.get("labels", {}))

    def _tolerations(self, given: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for each in given.get("tolerations", []):
            found.extend(
                self._input(each["tolerationJson"]) if "tolerationJson" in each else [each]
            )
        return found

    def _input(self, parameter: dict[str, str]) -> Any:
        return self._values[parameter["componentInputParameter"].removeprefix("pipelinechannel--")]

    def _bring(self, path: str) -> None:
        try:
            data = self.store.get(f"{self.prefix}{path}")
        except KeyError:
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)

    def _make_workflow(self) -> Workflow:
        run = str(uuid.uuid4())
        made = self.custom.create_namespaced_custom_object(
            "argoproj.io",
            "v1alpha1",
            self.namespace,
            "workflows",
            {
                "apiVersion": "argoproj.io/v1alpha1",
                "kind": "Workflow",
                "metadata": {"generateName": "src-pipeline-"},
                "spec": {},
            },
        )
        return Workflow(made["metadata"]["name"], made["metadata"]["uid"], run)


def _files(executor_input: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The paths of a task's inputs and outputs: kfp's local URIs are paths."""

    def of(side: str) -> list[str]:
        artifacts = executor_input.get(side, {}).get("artifacts", {}).values()
        return [each["uri"] for listed in artifacts for each in listed["artifacts"]]

    outputs = [*of("outputs"), executor_input["outputs"]["outputFile"]]
    parameters = executor_input["outputs"].get("parameters", {}).values()
    return of("inputs"), [*outputs, *(each["outputFile"] for each in parameters)]


def _volumes(given: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    mounts, volumes = [], []
    for each in given.get("emptyDirMounts", []):
        size = {"sizeLimit": each["sizeLimit"]} if "sizeLimit" in each else {}
        medium = {"medium": each["medium"]} if "medium" in each else {}
        mounts.append({"name": each["volumeName"], "mountPath": each["mountPath"]})
        volumes.append({"name": each["volumeName"], "emptyDir": {**medium, **size}})
    for each in given.get("configMapAsVolume", []):
        mounts.append({"name": each["configMapName"], "mountPath": each["mountPath"]})
        volumes.append(
            {"name": each["configMapName"], "configMap": {"name": each["configMapName"]}}
        )
    return mounts, volumes


def _secret(variable: str, secret: str, key: str) -> dict[str, Any]:
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdigit() else value
