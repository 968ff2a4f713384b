"""Makes this machine the node of a test cluster, and removes every trace of that.

Pods are on a bridge of this machine. The address of the bridge is that of the node, the name server
and the object store, so that nothing depends on the networks that the machine is in. It has no
access to other networks. Settings that look odd make it work in a container, or for a root user
without all capabilities.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

from .control_plane import LOOPBACK, Command, Settings, built
from .processes import ClusterError, MissingError, process_ids, wait_until

BRIDGE = "srccore-pods"
ADDRESS = "10.244.0.1"
HARDWARE_ADDRESS = "0a:58:0a:f4:00:01"
"""Without its own MAC address, a bridge has the smallest of its ports', which changes whenever a
pod comes or goes: what other pods send to the former address is lost for half a minute."""
PODS = "10.244.0.0/24"
NAME = "node1"
REGISTRY = f"{LOOPBACK}:5000"
"""Containerd and podman use plain HTTP for a registry on the loopback address."""
SANDBOX = f"{REGISTRY}/probe:test"
"""The image of the process that every pod has in addition to its own."""
GPU_LABEL = "nvidia.com/gpu.present"
GPU_TAINT = "nvidia.com/gpu"
ADVERTISED_GPUS = [
    {"op": "add", "path": f"/status/{name}/nvidia.com~1gpu", "value": "8"}
    for name in ("capacity", "allocatable")
]
"""A patch of the node's status; nothing uses the devices themselves."""
S3_KEY, S3_SECRET = "the-key", "the-secret"
PLUGINS = Path("/usr/lib/cni")
NEEDS = {
    "containerd": "containerd",
    "runc": "runc",
    "docker-registry": "docker-registry",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "umount": "mount",
    str(PLUGINS / "bridge"): "containernetworking-plugins",
}
"""The Debian package of every program."""
SOCKET_LIMIT = 100
_USER = "/run/srccore-test-cluster"
"""Contains the folder of the cluster whose node this machine is."""


def check_machine(folder: Path) -> None:
    """Raises MissingError if this machine cannot be a node."""
    if os.geteuid() != 0:
        raise MissingError("A cluster with a node requires root; size api does not.")
    missing = sorted({package for name, package in NEEDS.items() if shutil.which(name) is None})
    if missing:
        raise MissingError(
            f"Missing: {', '.join(missing)}. "
            f"apt-get install --no-install-recommends {' '.join(missing)}"
        )
    if len(str(_socket(folder))) > SOCKET_LIMIT:
        raise ClusterError(
            f"The path {folder} is too long for sockets. Move the checkout to a shorter path."
        )


def other_folder(folder: Path) -> Path | None:
    """The folder of another cluster whose node is, or was, this machine."""
    with contextlib.suppress(FileNotFoundError):
        named = Path(Path(_USER).read_text("utf-8"))
        if named != folder and named.exists():
            return named
    return None


def write_files(folder: Path, settings: Settings) -> None:
    """Writes the settings of a node's programs into a cluster's folder."""
    for name, content in {
        "cni/10-bridge.conflist": _network(folder),
        "registry.json": _registry(folder),
        "kubelet.json": _kubelet(folder, settings),
        "proxy.json": _proxy(folder),
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    (folder / "containerd.toml").write_text(_containerd(folder), encoding="utf-8")
    (folder / "Corefile").write_text(_name_server(folder), encoding="utf-8")
    for name in ("data", "sidecar", "users"):
        (folder / "s3" / name).mkdir(parents=True, exist_ok=True)


def check_alone() -> None:
    """Raises ClusterError if another kubelet has pods here: they would kill each other's pods."""
    if any((group / "cgroup.procs").read_text("utf-8") for group in _control_groups()):
        raise ClusterError("This machine is the node of another cluster, which has pods on it.")


def make_network(folder: Path) -> None:
    """Creates the bridge, and allows its packets."""
    Path(_USER).write_text(str(folder), encoding="utf-8")
    if subprocess.run(["ip", "link", "show", BRIDGE], check=False, capture_output=True).returncode:
        _run("ip", "link", "add", BRIDGE, "address", HARDWARE_ADDRESS, "type", "bridge")
        _run("ip", "address", "add", f"{ADDRESS}/24", "dev", BRIDGE)
    _run("ip", "link", "set", BRIDGE, "up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1", encoding="utf-8")


def registry(folder: Path) -> Command:
    return ["docker-registry", "serve", folder / "registry.json"]


def containerd(folder: Path) -> Command:
    return ["containerd", "--config", folder / "containerd.toml"]


def containerd_listens(folder: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(_socket(folder))) == 0


def name_server(folder: Path) -> Command:
    return [built("coredns"), "-conf", folder / "Corefile"]


def kubelet(folder: Path) -> Command:
    return [
        built("kubelet"),
        f"--config={folder / 'kubelet.json'}",
        f"--kubeconfig={folder / 'own-kubeconfig'}",
        f"--root-dir={folder / 'kubelet'}",
        f"--cert-dir={folder / 'kubelet' / 'pki'}",
        f"--hostname-override={NAME}",
        f"--node-ip={ADDRESS}",
        f"--node-labels={GPU_LABEL}=true",
    ]


def proxy(folder: Path) -> Command:
    return [built("kube-proxy"), f"--config={folder / 'proxy.json'}"]


def s3_server(folder: Path, settings: Settings) -> Command:
    kept = folder / "s3"
    return [
        *(built("versitygw"), "--quiet", "--port", f"{ADDRESS}:{settings.s3_port}"),
        *("--access", S3_KEY, "--secret", S3_SECRET, "--iam-dir", kept / "users"),
        *("posix", "--sidecar", kept / "sidecar", kept / "data"),
    ]


def clean(folder: Path) -> None:
    """Kills all containers of a cluster whose programs have exited, and unmounts its file systems.

    Raises:
        ClusterError: Something stays mounted.
    """
    wait_until("all containers have ended", lambda: not _kill_containers(folder), within=30)
    points = _mounted(folder)
    if points:
        subprocess.run(["umount", "--lazy", *reversed(points)], check=False, capture_output=True)
    if left := _mounted(folder):
        raise ClusterError(
            f"Still mounted: {', '.join(map(str, left))}. Unmount them with umount --lazy."
        )
    subprocess.run(["ip", "link", "delete", BRIDGE], check=False, capture_output=True)
    subprocess.run([built("kube-proxy"), "--cleanup"], check=False, capture_output=True)
    for result in Path("/var/lib/cni/results").glob("*"):
        if f"{folder}/" in result.read_text("utf-8"):
            result.unlink(missing_ok=True)
    for group in _control_groups():
        with contextlib.suppress(OSError):  # not empty, so not ours
            group.rmdir()
    Path(_USER).unlink(missing_ok=True)


def _control_groups() -> list[Path]:
    """The cgroups that a kubelet creates for pods, inner before outer."""
    top = Path("/sys/fs/cgroup")
    roots = [*top.glob("kubepods"), *top.glob("*/kubepods")]
    return [path for root in roots for path in [*_folders(root), root]]


def _folders(root: Path) -> list[Path]:
    return sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True)


def _kill_containers(folder: Path) -> int:
    """Kills the processes in containers of this folder, and their shims; returns their number."""
    found = [pid for pid in process_ids() if _is_contained(pid, folder) or _is_shim(pid, folder)]
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(found)


def _is_contained(pid: int, folder: Path) -> bool:
    """Whether its root file system consists of layers in this folder; only ours do."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/mountinfo").read_text("utf-8").splitlines():
            fields = line.split()
            if fields[4] == "/":
                return f"={folder}/containerd/" in fields[-1]
    return False


def _is_shim(pid: int, folder: Path) -> bool:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return "containerd-shim" in words[0] and str(_socket(folder)) in words
    return False


def _mounted(folder: Path) -> list[Path]:
    """What is mounted under a folder, outer before inner."""
    lines = Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
    points = [re.sub(r"\\(\d{3})", _octal, line.split()[4]) for line in lines]
    return sorted(Path(point) for point in points if point.startswith(f"{folder}/"))


def _octal(found: re.Match[str]) -> str:
    return chr(int(found[1], 8))


def _run(*words: str) -> None:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(words)}: {done.stderr.strip()}")


def _socket(folder: Path) -> Path:
    return folder / "containerd" / "socket"


def _containerd(folder: Path) -> str:
    root = folder / "containerd"
    return f"""\
version = 2
root = "{root}/root"
state = "{root}/state"
[grpc]
  address = "{_socket(folder)}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{root}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{SANDBOX}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{PLUGINS}"
    conf_dir = "{folder}/cni"
"""


def _network(folder: Path) -> dict[str, Any]:
    addresses = {
        "type": "host-local",
        "dataDir": str(folder / "cni" / "addresses"),
        "ranges": [[{"subnet": PODS}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "hairpinMode": True}
    return {"cniVersion": "1.0.0", "name": BRIDGE, "plugins": [{**bridge, "ipam": addresses}]}


def _registry(folder: Path) -> dict[str, Any]:
    return {
        "version": "0.1",
        "log": {"accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "registry")}},
        "http": {"addr": REGISTRY},
    }


def _kubelet(folder: Path, settings: Settings) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": f"unix://{_socket(folder)}",
        "port": settings.kubelet_port,
        "healthzPort": 0,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(folder / "pki" / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "clusterDNS": [ADDRESS],
        "clusterDomain": "cluster.local",
        "podLogsDir": str(folder / "pod-logs"),
        "maxPods": 100,
        "registerWithTaints": [
            {"key": GPU_TAINT, "value": "present", "effect": "PreferNoSchedule"}
        ],
        # For a host in a container, and a root without CAP_SYS_RESOURCE.
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "failSwapOn": False,
        "enforceNodeAllocatable": [],
        "localStorageCapacityIsolation": False,
        "featureGates": {"KubeletInUserNamespace": True},
        "makeIPTablesUtilChains": False,  # nothing needs them, and nothing would remove them
        # A full disk is not the concern of the tests.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"nodefs.available": "0%", "nodefs.inodesFree": "0%"},
    }


def _proxy(folder: Path) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clusterCIDR": PODS,
        "clientConnection": {"kubeconfig": str(folder / "own-kubeconfig")},
        "hostnameOverride": NAME,
        # Responses between pods on the bridge pass through the node, which then knows
        # which connection they belong to, whether or not the kernel filters bridged packets.
        "iptables": {"masqueradeAll": True, "localhostNodePorts": False},
        "conntrack": {"maxPerCore": 0, "min": 0},
    }


def _name_server(folder: Path) -> str:
    return f"""\
.:53 {{
    bind {ADDRESS}
    errors
    kubernetes cluster.local {{
        kubeconfig {folder / "own-kubeconfig"}
    }}
    cache 5
}}
"""
