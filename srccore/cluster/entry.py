"""The entry point of a training pod: starts torchrun and exits the way its processes did.

It is process 1: it reaps orphans and forwards signals, and its exit code is that of the pod.
torchrun itself exits with 1 for every failure. This entry point exits with

* 0 if the stage is published, 2 if the user can fix the error, 1 after any other error;
* 143 if it received SIGTERM, and 128 + n if signal n killed a training process.

The job's controller recreates a pod that exits with 128 or more. Lost peers are waited for inside
the pod: when another pod is lost, the connections to it break, torchrun runs another rendezvous,
and the processes resume from the newest checkpoint. When the pod that hosts the rendezvous is
lost, torchrun itself is restarted. The last line of the log says what went wrong.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from srccore.cluster.worker import NOTES, STARTED, Note, die_with_parent
from srccore.errors import UserError

__all__ = ["World", "run"]

WORKER = "srccore.cluster.worker"
RESTARTS = 10
PATIENCE = 3600
STOPS_WITHIN = 20
"""Seconds that torchrun gives its processes to exit; torchrun itself gets twice as long."""
ANSWERS = 300
"""Seconds after which torchrun gives up on a rendezvous host that does not respond."""
PAUSE = 2.0
"""Seconds before torchrun is restarted."""
POLL = 0.2


@dataclass(frozen=True)
class World:
    """The processes that train together, according to this pod's environment.

    Attributes:
        pods: Number of pods.
        processes: Number of processes in each pod.
        endpoint: Host and port of the rendezvous.
        address: The address of this pod for the others. The first pod has the smallest one.
        is_host: Whether this pod hosts the rendezvous.
        restarts: How often to wait for lost peers.
        patience: How long to wait for the other pods, in seconds.
    """

    pods: int
    processes: int
    endpoint: str
    address: str
    is_host: bool
    restarts: int
    patience: int

    @classmethod
    def of(
        cls,
        pods: int,
        processes: int,
        environment: Mapping[str, str],
        restarts: int = RESTARTS,
        patience: int = PATIENCE,
    ) -> World:
        """Reads what the operator set, and compares it with what was requested.

        Args:
            pods: The requested number of pods.
            processes: The requested number of processes in each pod.
            environment: The container's environment: operators configure torchrun by ``PET_*``.
            restarts: How often to wait for lost peers.
            patience: How long to wait for the other pods, in seconds.

        Raises:
            UserError: They differ: each pod would train alone, or wait forever.
        """
        nodes = environment.get("PET_NNODES")
        if set((nodes or "1").split(":")) != {str(pods)}:
            raise UserError(
                f"Expected {_count(pods, 'pod')} to train together, but PET_NNODES is "
                f"{nodes or 'not set'} in this pod.",
                f"Set minReplicas and maxReplicas of a PyTorchJob's elasticPolicy, or numNodes of "
                f"a TrainJob's trainer, to {pods}.",
            )
        started = environment.get("PET_NPROC_PER_NODE", str(processes))
        if started.isdigit() and int(started) != processes:
            raise UserError(
                f"Expected {_count(processes, 'process', 'processes')} in each pod, but "
                f"PET_NPROC_PER_NODE is {started} in this one.",
                f"Set nprocPerNode of the PyTorchJob, or numProcPerNode of the TrainJob's trainer, "
                f"to {processes}.",
            )
        endpoint = _endpoint(pods, environment)
        host = endpoint.rpartition(":")[0]
        own = environment.get("HOSTNAME") or socket.gethostname()
        rank = environment.get("PET_NODE_RANK")
        is_host = pods == 1 or (rank == "0" if rank else own in (host, host.partition(".")[0]))
        return cls(
            pods=pods,
            processes=processes,
            endpoint=endpoint,
            address=host if is_host else own,
            is_host=is_host,
            restarts=restarts,
            patience=patience,
        )

    def torchrun(self, worker: str, arguments: Sequence[str], restarts: int) -> list[str]:
        """The command that starts this pod's processes.

        Args:
            worker: The module that each process runs.
            arguments: Its arguments.
            restarts: How often to wait for lost peers.
        """
        waiting = f"is_host={int(self.is_host)},join_timeout={self.patience},read_timeout={ANSWERS}"
        return [
            *(sys.executable, "-m", "srccore.cluster.rendezvous"),
            *("--nnodes", str(self.pods), "--nproc-per-node", str(self.processes)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", self.endpoint),
            *("--rdzv-id", "training", "--rdzv-conf", waiting),
            # Ranks are assigned in the order of the addresses.
            *("--local-addr", self.address),
            *("--max-restarts", str(restarts), "--shutdown-timeout", str(STOPS_WITHIN)),
            *("-m", worker, "--world-size", str(self.pods * self.processes), *arguments),
        ]


def _endpoint(pods: int, environment: Mapping[str, str]) -> str:
    """The rendezvous in the first pod, as either operator describes it."""
    if found := environment.get("PET_RDZV_ENDPOINT"):
        return found
    if "PET_MASTER_ADDR" in environment:
        return f"{environment['PET_MASTER_ADDR']}:{environment.get('PET_MASTER_PORT', '29500')}"
    if pods == 1:
        return "127.0.0.1:0"
    raise UserError(
        "This pod cannot find the others: neither PET_RDZV_ENDPOINT nor PET_MASTER_ADDR is set.",
        "Start it through the Training Operator or Kubeflow Trainer, which set them.",
    )


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or f'{one}s'}"


class _Notes:
    """What the processes recorded about their starts and exits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts = folder / STARTED
        self.starts.touch()

    def _all(self) -> list[Note]:
        paths = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return [Note.model_validate_json(path.read_text(encoding="utf-8")) for path in paths]

    def final(self) -> Note | None:
        """The first note that rules out another attempt."""
        return next((note for note in self._all() if note.is_final), None)

    def last(self) -> Note | None:
        """The latest note."""
        return next(reversed(self._all()), None)

    def rounds(self, processes: int) -> int:
        """How often that number of processes was started."""
        return self.starts.stat().st_size // processes

    def quiet_seconds(self) -> float:
        """How long ago a process was last started."""
        return time.time() - self.starts.stat().st_mtime


class _Signals:
    """The signal that this process received, if any."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)

    def _take(self, number: int, _frame: object) -> None:
        self.received = self.received or number


def run(world: World, worker: str, arguments: Sequence[str]) -> int:
    """Trains until it succeeds or until another attempt would not help.

    Args:
        world: The processes.
        worker: The module that each process runs.
        arguments: Its arguments.

    Returns:
        The exit code of the container.
    """
    signals = _Signals()
    with tempfile.TemporaryDirectory(prefix="notes-") as folder:
        notes = _Notes(Path(folder))
        left = world.restarts
        while left >= 0 and notes.quiet_seconds() < world.patience:
            ended = _torchrun(world.torchrun(worker, arguments, left), notes, signals)
            if ended == 0:
                return 0
            if signals.received:
                return 128 + signals.received
            if note := notes.final():
                print(note.text, file=sys.stderr, flush=True)
                return note.exit_code
            left = world.restarts - notes.rounds(world.processes)
            print("torchrun exited: it lost the other pods.", file=sys.stderr, flush=True)
            time.sleep(PAUSE)
        if last := notes.last():
            print(last.text, file=sys.stderr)
        text = f"The other pods did not start within {world.patience / 60:g} minutes."
        if left < 0:
            limit = world.restarts
            text = f"The other pods were lost {limit + 1} times; the limit is {limit}."
        print(f"Error: {text}", file=sys.stderr, flush=True)
        return 1


def _torchrun(command: Sequence[str], notes: _Notes, signals: _Signals) -> int:
    """Runs torchrun until it exits, or stops it after a signal or a final note."""
    # The command line already says all of it.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PET_")}
    environment[NOTES] = str(notes.folder)
    # Otherwise a later rendezvous would use the address in the store of the first one.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Their warnings about lost peers are long and useless.
    environment = {"TORCH_CPP_LOG_LEVEL": "ERROR", "LOGLEVEL": "ERROR", **environment}
    # In its own session, so that Ctrl-C in a terminal reaches it once, through this process.
    child = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        preexec_fn=die_with_parent,  # noqa: PLW1509  # this process has one thread
    )
    stop_by = float("inf")
    while (ended := _reap(child)) is None:
        if stop_by == float("inf") and (signals.received or notes.final()):
            child.send_signal(signals.received or signal.SIGTERM)
            stop_by = time.monotonic() + 2 * STOPS_WITHIN
        elif time.monotonic() > stop_by:
            # Its processes die with it.
            child.kill()
        time.sleep(POLL)
    return ended


def _reap(child: subprocess.Popen[bytes]) -> int | None:
    """The exit code of the child once it has exited; reaps orphans adopted by process 1, too."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return child.returncode
        if pid == child.pid:
            child.returncode = os.waitstatus_to_exitcode(status)
        elif pid == 0:
            return child.returncode


def main() -> int:
    """Runs one pod of a training job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument(
        "--restarts", type=int, default=RESTARTS, help="how often to wait for lost pods"
    )
    parser.add_argument(
        "--patience", type=int, default=PATIENCE, help="how long to wait for the others, in seconds"
    )
    parser.add_argument("--task", required=True)
    parser.add_argument("--worker", default=WORKER, help="the module that each process runs")
    given = parser.parse_args()
    try:
        world = World.of(given.pods, given.processes, os.environ, given.restarts, given.patience)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return run(world, given.worker, ["--task", given.task])


if __name__ == "__main__":
    sys.exit(main())
