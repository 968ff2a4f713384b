"""What it costs to watch training jobs: the client's requests, bytes and memory, as both grow.

    python -m benchmarks.watching

Every job has a client of its own, as every step of a pipeline is a pod of its own: a process that
runs `srccore.cluster.launch.Launch` with the rights of `manifests/base`. The API server, its store
and its controllers are real. Nodes and pods are kwok's, which has pods run that no machine runs;
this process plays the operator, the scheduler and the kubelets' logs. Pods of others are in the
same namespace, with an event each, and some of them are replaced every second.

Numbers grow while the clients go on: first jobs are added, then the pods of others, then all jobs
lose their pods and wait, then jobs are taken away. Requests are counted in the API server's audit
log by user agent. Prints the Markdown tables of `RESULTS.md`. Needs 8 GB of memory for 100 jobs,
and `python -m tests.cluster.build etcd kubernetes kwok`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import ssl
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import yaml
from kubernetes.client import ApiClient

from srccore.cluster.api import Api
from srccore.cluster.request import JobSettings, TrainingJobRequest
from tests.cluster.clusters import Cluster
from tests.cluster.control_plane import built
from tests.cluster.job_controller import Administrator, JobController, PodLogs, configuration
from tests.cluster.pki import write_kubeconfig
from tests.cluster.processes import Programs, wait_until

ROLE = Path(__file__).parents[1] / "manifests/base/role.yaml"
ACCOUNT = "srccore-launcher"
NAMESPACE = "training"
CORE = f"/api/v1/namespaces/{NAMESPACE}"
AGENT = "watching-"
SERVERS = ("kube-apiserver", "etcd")
NODES = 50
AT_ONCE = 10
"""Clients that are started together: each imports for most of a second."""
REPLACED_A_SECOND = 10
LOG_SECONDS = 10
WITHIN = 300

CLIENT = """
import os, sys
kubeconfig, agent, request = sys.argv[1:]
os.environ["KUBECONFIG"] = kubeconfig
from srccore.cluster.api import connect
from srccore.cluster.launch import Launch
from srccore.cluster.request import PYTORCHJOB, TrainingJobRequest

api = connect()
api.client.user_agent = agent
Launch(api, PYTORCHJOB, TrainingJobRequest.model_validate_json(request), lambda: False).run()
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 10, 100], help="rising")
    parser.add_argument("--bystanders", type=int, default=4900, help="pods of others")
    parser.add_argument(
        "--minutes", type=int, default=1, help="of each measurement; a watch is asked for each"
    )
    arguments = parser.parse_args()
    measured = []
    with (
        Cluster("api") as cluster,
        kubelets(cluster) as port,
        contextlib.closing(World(cluster, port)) as world,
    ):
        for phase in phases(arguments.jobs, arguments.bystanders):
            world.become(phase)
            print(f"{datetime.now():%H:%M:%S} {phase}", file=sys.stderr, flush=True)
            measured.append(world.measure(phase, 60 * arguments.minutes))
        requests = audited(cluster.audit_log)
    print(table(measured, requests))
    print(f"\n{comparison(measured, requests)}")
    print(f"\n{over_time(measured)}")


@dataclasses.dataclass(frozen=True)
class Phase:
    """How much there is of everything."""

    jobs: int
    bystanders: int
    waiting: bool = False


def phases(jobs: Sequence[int], bystanders: int) -> list[Phase]:
    return [
        Phase(jobs[0], 0, waiting=True),
        *(Phase(count, 0) for count in jobs),
        Phase(jobs[-1], bystanders),
        Phase(jobs[-1], bystanders, waiting=True),
        *(Phase(count, bystanders) for count in reversed(jobs[:-1])),
    ]


# What is measured


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a process has used so far, and the memory that it has."""

    cpu_seconds: float
    bytes_read: int
    memory: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        """Reads what the kernel knows."""
        process = Path(f"/proc/{pid}")
        ticks = process.joinpath("stat").read_text().rpartition(")")[2].split()[11:13]
        # Sockets are read as files are: what a client reads later on is what the server sends.
        read = process.joinpath("io").read_text().split()[1]
        pages = process.joinpath("statm").read_text().split()[1]
        return cls(
            cpu_seconds=sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
            bytes_read=int(read),
            memory=int(pages) * os.sysconf("SC_PAGE_SIZE"),
        )

    def since(self, before: Usage) -> Usage:
        """What was used since then, and the memory of now."""
        return Usage(
            self.cpu_seconds - before.cpu_seconds, self.bytes_read - before.bytes_read, self.memory
        )


@dataclasses.dataclass(frozen=True)
class Measured:
    """One phase; per minute, and per client where it is about clients.

    Attributes:
        phase: What there was.
        began: When.
        ended: When.
        age: Seconds since the first client was started.
        kilobytes: That a client read.
        client_cpu: Seconds.
        memory: MiB of every client in the end, the first one first.
        server_cpu: Seconds.
        events: What a watch of all pods of the namespace was told.
        event_megabytes: The same, in bytes.
    """

    phase: Phase
    began: datetime
    ended: datetime
    age: float
    kilobytes: float
    client_cpu: float
    memory: list[float]
    server_cpu: float
    events: float
    event_megabytes: float


def audited(log: Path) -> list[tuple[datetime, str]]:
    """When the clients asked, and what."""
    found = {}
    with log.open(encoding="utf-8") as lines:
        for line in lines:
            # A stream is there twice: when it begins and when it ends.
            if f'"userAgent":"{AGENT}' in line:
                event = json.loads(line)
                thing = event["objectRef"]
                what = "/".join(filter(None, [thing["resource"], thing.get("subresource")]))
                at = datetime.fromisoformat(event["requestReceivedTimestamp"])
                found[event["auditID"]] = (at, f"{event['verb']} {what}")
    return list(found.values())


def asked(measured: Measured, requests: list[tuple[datetime, str]]) -> dict[str, float]:
    """The requests of a phase, per minute and job, by what was asked."""
    counts = collections.Counter(
        what for at, what in requests if measured.began <= at < measured.ended
    )
    minutes = (measured.ended - measured.began).total_seconds() / 60
    return {what: count / minutes / measured.phase.jobs for what, count in sorted(counts.items())}


# What is there


class World:
    """A cluster with jobs, their clients, and pods of others.

    Args:
        cluster: Of size api.
        port: Where kubelets answer.
    """

    def __init__(self, cluster: Cluster, port: int) -> None:
        self._cluster = cluster
        self._admin = Administrator(cluster)
        self._api = Api(
            ApiClient(configuration(cluster.server, cluster.token, str(cluster.ca))), NAMESPACE
        )
        self._programs = Programs(cluster.folder)
        self._kubeconfig = cluster.folder / "client-kubeconfig"
        self._jobs: list[JobController] = []
        self._have_pods = False
        self._bystanders = Bystanders(self._admin)
        self._started = 0.0
        self._prepare(port)

    def _prepare(self, port: int) -> None:
        kubectl = self._cluster.kubectl
        kubectl("create", "namespace", NAMESPACE)
        kubectl("create", "serviceaccount", ACCOUNT, "--namespace", NAMESPACE)
        role = next(each for each in yaml.safe_load_all(ROLE.read_text()) if each["kind"] == "Role")
        kubectl("create", "--namespace", NAMESPACE, "-f", "-", stdin=json.dumps(role))
        binding = (f"--role={ACCOUNT}", f"--serviceaccount={NAMESPACE}:{ACCOUNT}")
        kubectl("create", "rolebinding", ACCOUNT, "--namespace", NAMESPACE, *binding)
        token = self._cluster.token_for(NAMESPACE, ACCOUNT)
        write_kubeconfig(self._kubeconfig, self._cluster.server, self._cluster.ca, token)
        # Without leases the nodes would count as lost, and their pods be evicted.
        kwok = ("--kubeconfig", self._cluster.kubeconfig, "--manage-all-nodes")
        leases = "--node-lease-duration-seconds=40"
        self._programs.start("kwok", [built("kwok"), *kwok, leases])
        for number in range(NODES):
            self._admin.ask("POST", "/api/v1/nodes", node(number, port))

    def become(self, phase: Phase) -> None:
        """Changes what there is; returns when every client has seen it."""
        while len(self._jobs) > phase.jobs:
            self._end_job()
        if phase.bystanders and not self._bystanders.count:
            self._bystanders.come(phase.bystanders)
        while len(self._jobs) < phase.jobs:
            self._start_jobs(min(AT_ONCE, phase.jobs - len(self._jobs)))
        if self._have_pods == phase.waiting:
            self._set_pods(self._jobs, not phase.waiting)
        # Logs begin a moment after the pods.
        time.sleep(3)

    def _start_jobs(self, count: int) -> None:
        first = len(self._jobs)
        new = []
        for number in range(first, first + count):
            request = TrainingJobRequest(
                stage="train-dpo",
                run=f"n{number}",
                namespace=NAMESPACE,
                task="{}",
                settings=JobSettings(image="none"),
            )
            name = request.name(1)
            words = (self._kubeconfig, f"{AGENT}{name}", request.model_dump_json())
            self._programs.start(name, [sys.executable, "-c", CLIENT, *words])
            new.append(JobController(self._admin, NAMESPACE, name, PodLogs()))
        self._started = self._started or time.monotonic()
        for job in new:
            there = functools.partial(self._admin.is_there, job.path)
            self._programs.wait_until(f"there is {job.name}", there, WITHIN)
            job.take_up()
        self._jobs += new
        self._set_pods(new, self._have_pods)

    def _end_job(self) -> None:
        job = self._jobs.pop()
        self._programs.stop(job.name)
        job.remove()

    def _set_pods(self, jobs: Sequence[JobController], there: bool) -> None:
        """Gives jobs their pods, or takes them away; waits until their clients have said so."""
        self._have_pods = there
        told = {job.name: len(self._told(job)) for job in jobs}
        for job in jobs:
            if there:
                self._run(job)
            else:
                job.condition("Suspended", drops="Running")
                Kubelet.running.discard(job.pod(0))
                job.remove_pod(0)
        word = "1 pod is running" if there else "is waiting in its queue"

        def says(job: JobController) -> bool:
            return word in self._told(job)[told[job.name] :]

        for job in jobs:
            seen = functools.partial(says, job)
            self._programs.wait_until(f"{job.name} is said to be so: {word}", seen, WITHIN)

    def _run(self, job: JobController) -> None:
        """What the operator and the scheduler do; kwok does the rest."""
        job.make_pods()
        pod = job.pod(0)
        Kubelet.running.add(pod)
        target = {"kind": "Node", "name": _node(self._jobs.index(job) % NODES)}
        body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod}, "target": target}
        self._admin.ask("POST", f"{CORE}/pods/{pod}/binding", body)
        job.condition("Running", drops="Suspended")

    def measure(self, phase: Phase, seconds: int) -> Measured:
        """Looks on for so long."""
        pids = [self._pid(name) for name in (*SERVERS, *(job.name for job in self._jobs))]
        version = self._api.get(f"{CORE}/pods", limit="1")["metadata"]["resourceVersion"]
        began, before = datetime.now(UTC), [Usage.of(pid) for pid in pids]
        # What a client would be told that does not say which pods it means.
        query = {"watch": "true", "resourceVersion": version, "timeoutSeconds": str(seconds)}
        watch = self._api.stream(f"{CORE}/pods", **query)
        sizes = [len(line) for line in watch.lines()]
        watch.close()
        ended, after = datetime.now(UTC), [Usage.of(pid) for pid in pids]
        minutes = (ended - began).total_seconds() / 60
        used = [now.since(then) for now, then in zip(after, before, strict=True)]
        servers, clients = used[: len(SERVERS)], used[len(SERVERS) :]
        return Measured(
            phase=phase,
            began=began,
            ended=ended,
            age=time.monotonic() - self._started,
            kilobytes=statistics.mean(each.bytes_read for each in clients) / 1000 / minutes,
            client_cpu=statistics.mean(each.cpu_seconds for each in clients) / minutes,
            memory=[each.memory / 2**20 for each in clients],
            server_cpu=sum(each.cpu_seconds for each in servers) / minutes,
            events=len(sizes) / minutes,
            event_megabytes=sum(sizes) / 1e6 / minutes,
        )

    def close(self) -> None:
        """Stops what it started, but for the cluster."""
        self._bystanders.go()
        for name in [*(job.name for job in self._jobs), "kwok"]:
            self._programs.stop(name)

    def _told(self, job: JobController) -> str:
        """What a client has said so far."""
        return (self._programs.logs / f"{job.name}.log").read_text("utf-8")

    def _pid(self, name: str) -> int:
        record = self._cluster.folder / "run" / f"{name}.json"
        return int(json.loads(record.read_text())["pid"])


class Bystanders:
    """Pods of others, some of which are replaced every second."""

    def __init__(self, admin: Administrator) -> None:
        self.count = 0
        self._admin = admin
        self._numbers = itertools.count()
        self._names: collections.deque[str] = collections.deque()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._replace)

    def come(self, count: int) -> None:
        """Creates them, waits until they run, and begins to replace them."""
        self.count = count
        with ThreadPoolExecutor(4) as pool:
            for _ in pool.map(self._create, range(count)):
                pass
        wait_until("all pods run", self._run, WITHIN)
        self._thread.start()

    def go(self) -> None:
        """Leaves off."""
        self._stopped.set()
        if self.count:
            self._thread.join()

    def _create(self, _: int = 0) -> None:
        number = next(self._numbers)
        name = f"other-{number}"
        self._names.append(name)
        pod = self._admin.ask(
            "POST",
            f"{CORE}/pods",
            {
                "metadata": {"name": name, "labels": {"app": "other"}},
                "spec": {
                    "nodeName": _node(number % NODES),
                    "containers": [{"name": "main", "image": "none"}],
                },
            },
        )
        event = {
            "metadata": {"generateName": f"{name}."},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "namespace": NAMESPACE,
                "name": name,
                "uid": pod["metadata"]["uid"],
            },
            "type": "Normal",
            "reason": "Started",
            "message": "Started container main",
            "source": {"component": "kubelet"},
        }
        self._admin.ask("POST", f"{CORE}/events", event)

    def _run(self) -> bool:
        others = self._admin.ask(
            "GET", f"{CORE}/pods", fieldSelector="status.phase!=Running", limit="1"
        )
        return not others["items"]

    def _replace(self) -> None:
        while not self._stopped.wait(1 / REPLACED_A_SECOND):
            self._admin.delete(f"{CORE}/pods/{self._names.popleft()}")
            self._create()


class Kubelet(BaseHTTPRequestHandler):
    """Tells the log of every container as a kubelet would: a line now and then."""

    running: ClassVar[set[str]] = set()
    """The pods whose logs go on."""

    def do_GET(self) -> None:
        """Tells a log until its pod is gone."""
        pod = self.path.split("/")[3]
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):  # nobody listens any more
            for step in itertools.count():
                if pod not in self.running:
                    return
                line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}000Z step {step}: loss 0.6931\n"
                self.wfile.write(line.encode())
                time.sleep(LOG_SECONDS)

    def log_message(self, *_: object) -> None:
        """Says nothing of a request."""


@contextlib.contextmanager
def kubelets(cluster: Cluster) -> Iterator[int]:
    """The port at which the kubelets of all nodes answer."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Kubelet)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    keys = cluster.ca.parent
    context.load_cert_chain(keys / "api-server.crt", keys / "api-server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()


def node(number: int, port: int) -> dict[str, Any]:
    size = {"cpu": "64", "memory": "512Gi", "pods": "110"}
    return {
        "metadata": {"name": _node(number)},
        "status": {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
            "capacity": size,
            "allocatable": size,
        },
    }


def _node(number: int) -> str:
    return f"node-{number}"


# What is printed


COLUMNS = (
    "jobs",
    "pods of others",
    "the jobs",
    "requests",
    "of which",
    "kB read",
    "CPU s",
    "MiB: first, median, largest",
    "CPU s of the servers",
    "watch of all pods",
)


def table(measured: Sequence[Measured], requests: list[tuple[datetime, str]]) -> str:
    """All phases; figures are per minute, and up to the memory per client."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for each in measured:
        phase, what = each.phase, asked(each, requests)
        rows.append(
            (
                f"{phase.jobs}",
                f"{phase.bystanders:,}",
                "wait" if phase.waiting else "run",
                f"{sum(what.values()):.2f}",
                ", ".join(f"{verb} {count:.2f}" for verb, count in what.items()),
                f"{each.kilobytes:.1f}",
                f"{each.client_cpu:.2f}",
                f"{each.memory[0]:.1f}, {statistics.median(each.memory):.1f}, "
                f"{max(each.memory):.1f}",
                f"{each.server_cpu:.1f}",
                f"{each.events:.0f} events, {each.event_megabytes:.1f} MB",
            )
        )
    return markdown(rows)


def comparison(measured: Sequence[Measured], requests: list[tuple[datetime, str]]) -> str:
    """The most of everything against the least of it."""
    running = [each for each in measured if not each.phase.waiting]
    least = running[0]
    most = max(running, key=lambda each: (each.phase.bystanders, each.phase.jobs))
    per_job = [sum(asked(each, requests).values()) for each in (least, most)]
    return (
        f"{most.phase.jobs} jobs among {most.phase.bystanders:,} pods against {least.phase.jobs} "
        f"among none: requests of a job x{per_job[1] / per_job[0]:.2f}, bytes that it reads "
        f"x{most.kilobytes / least.kilobytes:.2f}, memory of a client "
        f"x{statistics.median(most.memory) / statistics.median(least.memory):.2f}."
    )


def over_time(measured: Sequence[Measured]) -> str:
    """The first client's memory."""
    return markdown(
        [
            ("minutes since it began", *(f"{each.age / 60:.1f}" for each in measured)),
            ("---",) * (len(measured) + 1),
            ("MiB of the first client", *(f"{each.memory[0]:.1f}" for each in measured)),
        ]
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
