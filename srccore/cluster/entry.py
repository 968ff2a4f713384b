"""The entry of a training pod's container: starts torchrun, and ends as its processes did.

It is process 1: it reaps what is left to it, hands signals on, and its exit code is the pod's.
torchrun itself exits with 1 whatever happened. From here the pod ends with

* 0 where the stage is published, 2 where the user can mend what is wrong, 1 after another error;
* 143 where it was told to end (SIGTERM), and 128 + n where signal n killed a training process.

A job's controller makes a pod anew from 128 on. Within a pod, what is lost is waited for: when
another pod is gone, its peers' connections break, torchrun gathers the processes again, and they
go on from the newest checkpoint; when the pod is gone in which they meet, torchrun itself is
started again. The last line of the log says what was wrong.
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
"""Seconds that torchrun gives its processes to end; twice as much has torchrun itself."""
ANSWERS = 300
"""Seconds within which the pod where they meet answers, or torchrun gives up."""
PAUSE = 2.0
"""Seconds until torchrun is started again."""
POLL = 0.2


@dataclass(frozen=True)
class World:
    """The processes that shall train together, as this pod's environment tells of them.

    Attributes:
        pods: How many pods there are.
        processes: Processes of each pod.
        endpoint: Host and port where the pods meet.
        address: This pod's, for the others. The least of all is that of the first pod.
        is_host: Whether they meet in this pod.
        restarts: How often lost peers are waited for.
        patience: Seconds for which the other pods are waited for.
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
        """Reads what the operator tells, and compares it with what was asked for.

        Args:
            pods: Asked for.
            processes: Asked for, of each pod.
            environment: The container's: ``PET_*`` is what operators tell torchrun.
            restarts: How often lost peers are waited for.
            patience: Seconds for which the other pods are waited for.

        Raises:
            UserError: They do not add up: each pod would train alone, or wait for ever.
        """
        told = environment.get("PET_NNODES", "1")
        if set(told.split(":")) != {str(pods)}:
            raise UserError(
                f"{pods} pods shall train together, but this one was told of {told} "
                f"(PET_NNODES is {environment.get('PET_NNODES', 'not set')}).",
                "A PyTorchJob needs elasticPolicy with as many replicas, and a TrainJob "
                "spec.trainer with numNodes.",
            )
        told = environment.get("PET_NPROC_PER_NODE", str(processes))
        if told.isdigit() and int(told) != processes:
            raise UserError(
                f"{processes} processes of a pod shall train, but it was told to start {told}.",
                "See nprocPerNode of the PyTorchJob, or numProcPerNode of the TrainJob.",
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
            worker: The module that each of them runs.
            arguments: The module's.
            restarts: How often lost peers are waited for.
        """
        waiting = f"is_host={int(self.is_host)},join_timeout={self.patience},read_timeout={ANSWERS}"
        return [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", str(self.pods), "--nproc-per-node", str(self.processes)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", self.endpoint),
            *("--rdzv-id", "training", "--rdzv-conf", waiting),
            # Ranks follow the order of the addresses.
            *("--local-addr", self.address),
            *("--max-restarts", str(restarts), "--shutdown-timeout", str(STOPS_WITHIN)),
            *("-m", worker, "--world-size", str(self.pods * self.processes), *arguments),
        ]


def _endpoint(pods: int, environment: Mapping[str, str]) -> str:
    """Where the pods meet: the first one's address, by either operator."""
    if found := environment.get("PET_RDZV_ENDPOINT"):
        return found
    if "PET_MASTER_ADDR" in environment:
        return f"{environment['PET_MASTER_ADDR']}:{environment.get('PET_MASTER_PORT', '29500')}"
    if pods == 1:
        return "127.0.0.1:0"
    raise UserError(
        "This pod was not told where the others are: there is neither PET_RDZV_ENDPOINT nor "
        "PET_MASTER_ADDR.",
        "Let the Training Operator or Kubeflow Trainer start it.",
    )


class _Notes:
    """What the processes wrote of their starts and of their ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts = folder / STARTED
        self.starts.touch()

    def _all(self) -> list[Note]:
        paths = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return [Note.model_validate_json(path.read_text(encoding="utf-8")) for path in paths]

    def final(self) -> Note | None:
        """The first of those after which another attempt is of no use."""
        return next((note for note in self._all() if note.is_final), None)

    def last(self) -> Note | None:
        """The latest."""
        return next(reversed(self._all()), None)

    def rounds(self, processes: int) -> int:
        """How often so many processes were started."""
        return self.starts.stat().st_size // processes

    def quiet_seconds(self) -> float:
        """How long none was started."""
        return time.time() - self.starts.stat().st_mtime


class _Signals:
    """The signal that this process was sent, if any."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)

    def _take(self, number: int, _frame: object) -> None:
        self.received = self.received or number


def run(world: World, worker: str, arguments: Sequence[str]) -> int:
    """Trains until it is done, or until another attempt is of no use.

    Args:
        world: The processes.
        worker: The module that each of them runs.
        arguments: The module's.

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
            print("torchrun ended: it lost the other pods.", file=sys.stderr, flush=True)
            time.sleep(PAUSE)
        if last := notes.last():
            print(last.text, file=sys.stderr)
        text = f"The other pods did not come within {world.patience / 60:g} minutes."
        if left < 0:
            text = f"The other pods were lost {world.restarts + 1} times."
        print(f"Error: {text}", file=sys.stderr, flush=True)
        return 1


def _torchrun(command: Sequence[str], notes: _Notes, signals: _Signals) -> int:
    """Starts torchrun and sees it to its end, or to what ends it."""
    # All of it is on the command line.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PET_")}
    environment[NOTES] = str(notes.folder)
    # Else a later round would go by the address that the first one's store has.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Their warnings of lost peers are long, and of no use.
    environment = {"TORCH_CPP_LOG_LEVEL": "ERROR", "LOGLEVEL": "ERROR", **environment}
    # In a session of its own: what a terminal sends comes from here, once.
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
            # Its processes go with it.
            child.kill()
        time.sleep(POLL)
    return ended


def _reap(child: subprocess.Popen[bytes]) -> int | None:
    """The child's exit code, once it has ended; orphans that fell to process 1 go, too."""
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
    """Trains as one pod of a job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--restarts", type=int, default=RESTARTS, help="for lost pods")
    parser.add_argument("--patience", type=int, default=PATIENCE, help="seconds, for other pods")
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
