"""A real Kubernetes for the tests, in one of two sizes, that starts in seconds.

* ``api``: etcd, API server, controller manager. Needs no root; several can run at once. It serves
  the kinds of the Training Operator and Argo's Workflow, but nothing acts on them.
* ``node``: in addition a complete node, which is this machine: scheduler, containerd, kubelet,
  kube-proxy, DNS, a registry, an S3 server that checks keys, the Training Operator, and GPUs that
  are advertised but do not exist. Needs root; a machine can have one at a time.

All files of a cluster are in one folder. A lock on that folder shows whether the process that uses
the cluster is alive: the next process removes what a killed one left running or mounted.
"""

from __future__ import annotations

import abc
import contextlib
import fcntl
import functools
import http.client
import itertools
import json
import os
import shutil
import socket
import ssl
import subprocess
import urllib.request
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from . import control_plane, node, operators
from .build import CACHE, program
from .control_plane import LOOPBACK, Settings, built
from .processes import ClusterError, Programs
from .registry import push

if TYPE_CHECKING:
    from s3_server import S3Server

SIZES = ("api", "node")
NODE_FOLDER = CACHE / "node"
PROBE_ENTRY = "/probe"
KEPT = frozenset({"logs", "lock", "cluster.json", "registry"})
"""Kept in the folder of a cluster that is down: pushing images again takes minutes."""

_NUMBERS = itertools.count()


class KubectlError(ClusterError):
    """kubectl failed; ``stderr`` is its error output."""

    def __init__(self, words: tuple[str, ...], stderr: str) -> None:
        super().__init__(f"kubectl {' '.join(words)}: {stderr}")
        self.stderr = stderr


class Reachable(abc.ABC):
    """A cluster that is accessed with a kubeconfig."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig

    @property
    @abc.abstractmethod
    def registry(self) -> str:
        """Host and port of the registry that this machine pushes to and pods pull from."""

    @functools.cached_property
    def probe(self) -> str:
        """The image of tools/probe/main.go."""
        return push(self.registry, "probe", built("probe"), PROBE_ENTRY)

    def kubectl(self, *words: str, stdin: str | None = None) -> str:
        """Runs kubectl as an administrator; returns what it prints.

        Raises:
            KubectlError: It fails.
        """
        done = self._run_kubectl(words, stdin)
        if done.returncode != 0:
            raise KubectlError(words, done.stderr)
        return done.stdout

    def kubectl_succeeds(self, *words: str, stdin: str | None = None) -> bool:
        """Whether a kubectl command succeeds."""
        return self._run_kubectl(words, stdin).returncode == 0

    def token_for(self, namespace: str, service_account: str) -> str:
        """A token of a service account, valid for an hour."""
        return self.kubectl("create", "token", service_account, "--namespace", namespace).strip()

    def _run_kubectl(
        self, words: tuple[str, ...], stdin: str | None
    ) -> subprocess.CompletedProcess[str]:
        executable = program("kubectl") or shutil.which("kubectl") or built("kubectl")
        environment = {**os.environ, "KUBECONFIG": str(self.kubeconfig), **self._environment()}
        return subprocess.run(
            [str(executable), *words],
            input=stdin,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )

    def _environment(self) -> dict[str, str]:
        return {}


class Cluster(Reachable):
    """A cluster of our own, up while its context is open.

    Args:
        size: ``api`` or ``node``.
        folder: The folder for all of its files; by default one that no other cluster uses.
    """

    def __init__(self, size: str, folder: Path | None = None) -> None:
        assert size in SIZES, size
        self.size = size
        self.folder = (folder or (NODE_FOLDER if size == "node" else _new_folder())).resolve()
        super().__init__(self.folder / "kubeconfig")
        self._programs = Programs(self.folder)
        self._lock: IO[str] | None = None

    @classmethod
    def found(cls, folder: Path) -> Cluster:
        """The cluster that is up in a folder; it cannot be taken down while this process lives."""
        cluster = cls(Settings.read(folder).size, folder)
        cluster._take(fcntl.LOCK_SH)
        return cluster

    def __enter__(self) -> Cluster:
        _sweep()
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # What it offers

    @property
    def server(self) -> str:
        """The API server's URL."""
        return self._settings.server

    @property
    def token(self) -> str:
        """An administrator's token."""
        return self._settings.token

    @property
    def ca(self) -> Path:
        """The certificate that signed the API server's."""
        return self.folder / "pki" / "ca.crt"

    @property
    def logs(self) -> Path:
        """The folder of the programs' logs. It outlives the cluster."""
        return self._programs.logs

    @property
    def audit_log(self) -> Path:
        """Every request except those of the cluster's own programs, one JSON object per line."""
        return self.logs / "audit.log"

    @property
    def registry(self) -> str:
        self._needs_node("registry")
        return node.REGISTRY

    @property
    def s3(self) -> S3Server:
        """The S3 server, for pods and for this machine; no bucket is chosen."""
        from s3_server import S3Server

        self._needs_node("S3 server")
        endpoint = f"http://{node.ADDRESS}:{self._settings.s3_port}"
        return S3Server(endpoint, node.S3_KEY, node.S3_SECRET, "")

    def programs(self) -> dict[str, bool]:
        """Whether each program is running."""
        return {name: self._programs.is_running(name) for name in self._programs.names()}

    def condition(self) -> str:
        """Where the logs are, and which programs have ended by themselves."""
        return "\n".join([f"The logs are in {self.logs}.", *self._programs.ended()])

    def stop(self, name: str) -> None:
        """Kills a program: ``kube-controller-manager``."""
        self._programs.stop(name)

    def start(self, name: str) -> None:
        """Starts a program that was stopped."""
        self._programs.start_again(name)

    def restart_api_server(self) -> None:
        """Kills and restarts the API server, and waits until it is ready."""
        self.stop("kube-apiserver")
        self.start("kube-apiserver")
        self._wait_for_api_server()

    def install_trainer(self) -> None:
        """Installs Trainer v2, its runtime for torch, and JobSet, unless they are installed."""
        self._needs_node("place for operators")
        if not self.kubectl_succeeds("get", "clustertrainingruntime", "torch-distributed"):
            operators.install(self, operators.JOBSET, operators.TRAINER)
            operators.install_examples(self, operators.TRAINER)

    # Up and down

    def up(self) -> None:
        """Starts it, after removing what an earlier cluster left in the folder.

        Raises:
            ClusterError: Something is missing, is in the way or did not start.
        """
        if self.size == "node":
            node.check_machine(self.folder)
            if (other := node.other_folder(self.folder)) is not None:
                Cluster("node", other).down()
        self._take()
        try:
            self._remove(but=KEPT - {"logs"})
            self._start()
        except BaseException as error:
            error.add_note(self.condition())
            self.down()
            raise

    def down(self) -> None:
        """Stops everything, unmounts everything, and keeps the logs and the registry's images.

        Raises:
            ClusterError: Another process uses the cluster.
        """
        self._take()
        try:
            self._remove(but=KEPT)
        finally:
            self._leave()

    def _start(self) -> None:
        address = LOOPBACK
        if self.size == "node":
            node.check_alone()
            node.make_network(self.folder)
            address = node.ADDRESS
        settings = Settings.draw(self.size, address)
        settings.write(self.folder)
        self._settings = settings
        control_plane.write_files(self.folder, settings)
        self._programs.start("etcd", control_plane.etcd(self.folder, settings))
        self._programs.start("kube-apiserver", control_plane.api_server(self.folder, settings))
        if self.size == "node":
            self._start_containers()
        self._wait_for_api_server()
        # Before the controllers, which look for new kinds only every half minute.
        operators.install_kinds(self)
        manager = control_plane.controller_manager(self.folder)
        self._programs.start("kube-controller-manager", manager)
        if self.size == "node":
            self._start_node()
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        self._programs.wait_until("controllers work", lambda: self._get(account) is not None)
        if self.size == "node":
            operators.install(self, operators.TRAINING_OPERATOR)

    def _start_containers(self) -> None:
        host, port = node.REGISTRY.split(":")
        if _answers(host, int(port)):
            raise ClusterError(
                f"Another server listens at {node.REGISTRY}. Stop it, if it belongs to Debian's "
                "package, with systemctl disable --now docker-registry"
            )
        node.write_files(self.folder, self._settings)
        self._programs.start("registry", node.registry(self.folder))
        self._programs.start("containerd", node.containerd(self.folder))
        self._programs.wait_until("the registry answers", lambda: _answers(host, int(port)))
        assert self.probe  # the sandboxes of all pods are made from it
        listens = functools.partial(node.containerd_listens, self.folder)
        self._programs.wait_until("containerd listens", listens)

    def _start_node(self) -> None:
        folder, start = self.folder, self._programs.start
        start("kube-scheduler", control_plane.scheduler(folder))
        start("coredns", node.name_server(folder))
        start("kubelet", node.kubelet(folder))
        start("kube-proxy", node.proxy(folder))
        start("s3", node.s3_server(folder, self._settings))
        self._programs.wait_until("the node is ready", self._node_is_ready)
        words = ("--subresource=status", "--type=json", "--patch", json.dumps(node.ADVERTISED_GPUS))
        self.kubectl("patch", "node", node.NAME, *words)
        for what, port in (("DNS", 53), ("the S3 server", self._settings.s3_port)):
            answers = functools.partial(_answers, node.ADDRESS, port)
            self._programs.wait_until(f"{what} answers", answers)

    def _remove(self, but: frozenset[str]) -> None:
        # First those that would restart what is stopped.
        self._programs.stop_all(first=("kubelet", "kube-controller-manager", "containerd"))
        if self.size == "node":
            node.clean(self.folder)
        for path in self.folder.iterdir():
            if path.name not in but:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _take(self, kind: int = fcntl.LOCK_EX) -> None:
        if self._lock is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / "lock").open("a+")
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ClusterError(
                f"The cluster in {self.folder} is in use by process {lock.read()}. "
                "Wait for it, or stop it."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock

    def _leave(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # Asking

    @functools.cached_property
    def _settings(self) -> Settings:
        return Settings.read(self.folder)

    def _environment(self) -> dict[str, str]:
        # Otherwise kubectl would find the kinds of an earlier cluster with the same port.
        return {"KUBECACHEDIR": str(self.folder / "kubectl-cache")}

    def _needs_node(self, what: str) -> None:
        if self.size != "node":
            raise ClusterError(f"A cluster of size {self.size} has no {what}; use size node.")

    def _wait_for_api_server(self) -> None:
        self._programs.wait_until("the API server is ready", lambda: self._get("/readyz") == "ok")

    def _node_is_ready(self) -> bool:
        found = json.loads(self._get(f"/api/v1/nodes/{node.NAME}") or "{}")
        conditions: list[dict[str, Any]] = found.get("status", {}).get("conditions", [])
        return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)

    def _get(self, path: str) -> str | None:
        """What the API server has at a path; None if it has nothing there, or does not respond."""
        headers = {"Authorization": f"Bearer {self._settings.own_token}"}
        request = urllib.request.Request(f"{self.server}{path}", headers=headers)
        trust = ssl.create_default_context(cafile=str(self.ca))
        direct = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust)
        )
        try:
            with direct.open(request, timeout=5) as answer:
                return str(answer.read().decode())
        except (OSError, http.client.HTTPException):
            return None


def _new_folder() -> Path:
    return CACHE / f"api-{os.getpid()}-{next(_NUMBERS)}"


def _sweep() -> None:
    """Removes clusters of size api, and their logs, if their processes no longer exist."""
    for settings in CACHE.glob("api-*/cluster.json"):
        with contextlib.suppress(ClusterError, PermissionError):  # in use, or of another user
            Cluster("api", settings.parent).down()
            shutil.rmtree(settings.parent)


def _answers(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0
