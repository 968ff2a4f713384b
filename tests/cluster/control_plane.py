"""The programs of a Kubernetes without nodes: etcd, API server, controller manager; a scheduler.

Admission plugins, authorization and controllers are the defaults of Kubernetes. The API server's
audit log contains every request except those of the cluster's own programs, which have their own
token.
"""

from __future__ import annotations

import dataclasses
import json
import random
import secrets
import socket
from pathlib import Path

from .build import COMMAND, program
from .pki import Authority, write_kubeconfig
from .processes import ClusterError, MissingError

LOOPBACK = "127.0.0.1"
SERVICES = "10.96.0.0/16"
KUBERNETES_SERVICE = "10.96.0.1"
PORTS = range(20000, 30000)
"""Below those that systems assign to clients, so that a restarted server gets its port again."""

Command = list[str | Path]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is chosen at random for every cluster, and kept in its folder.

    ``address`` is the node's, or the loopback address if no node has to reach the API server.
    """

    size: str
    address: str
    token: str
    own_token: str
    etcd_port: int
    peer_port: int
    api_port: int
    kubelet_port: int
    s3_port: int

    @classmethod
    def draw(cls, size: str, address: str) -> Settings:
        token, own_token = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
        return cls(size, address, token, own_token, *_free_ports(5))

    @classmethod
    def read(cls, folder: Path) -> Settings:
        return cls(**json.loads((folder / "cluster.json").read_text("utf-8")))

    def write(self, folder: Path) -> None:
        path = folder / "cluster.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @property
    def server(self) -> str:
        """The address of the API server, the same for pods and for this machine."""
        return f"https://{self.address}:{self.api_port}"


def built(name: str) -> Path:
    """The program of that name.

    Raises:
        MissingError: It is not built.
    """
    path = program(name)
    if path is None:
        raise MissingError(f"{name} is not built. Build it: {COMMAND} {name}")
    return path


def write_files(folder: Path, settings: Settings) -> None:
    """Writes keys, tokens, kubeconfigs and the audit policy into a cluster's folder."""
    pki = folder / "pki"
    authority = Authority(pki)
    service = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", KUBERNETES_SERVICE)
    hosts = tuple(dict.fromkeys(("localhost", LOOPBACK, settings.address, *service)))
    authority.sign("api-server", "kube-apiserver", hosts=hosts)
    authority.sign("kubelet-client", "api-server", organization="system:masters")
    authority.key_pair("service-accounts")
    users = {"admin": settings.token, OWN_USER: settings.own_token}
    lines = [f'{token},{name},{name},"system:masters"\n' for name, token in users.items()]
    (pki / "tokens.csv").write_text("".join(lines), encoding="utf-8")
    for name, token in (("kubeconfig", settings.token), ("own-kubeconfig", settings.own_token)):
        write_kubeconfig(folder / name, settings.server, pki / "ca.crt", token)
    (folder / "audit-policy.json").write_text(json.dumps(AUDIT_POLICY), encoding="utf-8")


OWN_USER = "test-cluster"
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "None", "users": [OWN_USER, "system:apiserver"]},
        {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]},
        {"level": "None", "nonResourceURLs": ["/healthz*", "/livez*", "/readyz*"]},
        {"level": "Metadata"},
    ],
}


def etcd(folder: Path, settings: Settings) -> Command:
    client = f"http://{LOOPBACK}:{settings.etcd_port}"
    peer = f"http://{LOOPBACK}:{settings.peer_port}"
    return [
        built("etcd"),
        *("--data-dir", folder / "etcd", "--unsafe-no-fsync", "--log-level=warn"),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"default={peer}"),
    ]


def api_server(folder: Path, settings: Settings) -> Command:
    pki = folder / "pki"
    words: Command = [
        built("kube-apiserver"),
        f"--etcd-servers=http://{LOOPBACK}:{settings.etcd_port}",
        f"--bind-address={settings.address}",
        f"--advertise-address={settings.address}",
        f"--secure-port={settings.api_port}",
        f"--tls-cert-file={pki / 'api-server.crt'}",
        f"--tls-private-key-file={pki / 'api-server.key'}",
        f"--token-auth-file={pki / 'tokens.csv'}",
        "--authorization-mode=Node,RBAC",
        "--allow-privileged",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={pki / 'service-accounts.pub'}",
        f"--service-account-signing-key-file={pki / 'service-accounts.key'}",
        f"--service-cluster-ip-range={SERVICES}",
        "--kubelet-preferred-address-types=InternalIP",
        # Otherwise `kubectl logs` is refused.
        f"--kubelet-client-certificate={pki / 'kubelet-client.crt'}",
        f"--kubelet-client-key={pki / 'kubelet-client.key'}",
        f"--audit-policy-file={folder / 'audit-policy.json'}",
        f"--audit-log-path={folder / 'logs' / 'audit.log'}",
        "--audit-log-maxsize=2000",  # megabytes, before it starts a new file
    ]
    if settings.address == LOOPBACK:  # which is not allowed for endpoints of services
        words.append("--endpoint-reconciler-type=none")
    return words


def controller_manager(folder: Path) -> Command:
    return [
        built("kube-controller-manager"),
        f"--kubeconfig={folder / 'own-kubeconfig'}",
        f"--service-account-private-key-file={folder / 'pki' / 'service-accounts.key'}",
        f"--root-ca-file={folder / 'pki' / 'ca.crt'}",
        "--use-service-account-credentials",
        "--leader-elect=false",
        *("--kube-api-qps=500", "--kube-api-burst=500"),  # each controller uses its own account
        "--secure-port=0",  # serves nothing: several may run at once
    ]


def scheduler(folder: Path) -> Command:
    return [
        built("kube-scheduler"),
        f"--kubeconfig={folder / 'own-kubeconfig'}",
        "--leader-elect=false",
        "--secure-port=0",
    ]


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise ClusterError(f"Fewer than {count} ports in {PORTS} are free.")
