"""The pods of a training job on this machine: each one's entry, with torchrun and processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3_server import free_port

TESTS = Path(__file__).parent
WITHIN = 300.0


def until(done: Callable[[], object]) -> None:
    """Waits for a condition, with a deadline."""
    deadline = time.monotonic() + WITHIN
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


class Pod:
    """A running entry."""

    def __init__(self, folder: Path, arguments: list[str], environment: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / "log"
        with self.output.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "srccore.cluster.entry", *arguments],
                env=environment,
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> str:
        return self.output.read_text()

    @property
    def last_line(self) -> str:
        return self.log.rstrip().splitlines()[-1]

    def ends(self) -> int:
        """Its exit code."""
        return self.process.wait(WITHIN)

    def tell(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


class Job:
    """A job whose pods find each other on this machine.

    Args:
        folder: For logs and caches.
        pods: The number of pods.
        task: Their task.
        worker: The module that their processes run; None means the real one.
    """

    def __init__(self, folder: Path, pods: int, task: str, worker: str | None = None) -> None:
        self.folder, self.pods = folder, pods
        self.arguments = ["--pods", str(pods), "--processes", "1", "--restarts", "3"]
        self.arguments += ["--task", task]
        self.arguments += ["--worker", worker] if worker else []
        self.endpoint = f"127.0.0.1:{free_port()}"
        self.started: list[Pod] = []

    def start(self, index: int) -> Pod:
        """Starts a pod with an empty disk, as an operator would."""
        own = self.folder / f"pod-{len(self.started)}"
        environment = os.environ | {
            "HOSTNAME": f"127.0.0.{index + 1}",
            "PET_NNODES": f"{self.pods}:{self.pods}",
            "PET_RDZV_ENDPOINT": self.endpoint,
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            "SRCCORE_CACHE": str(own / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        self.started.append(Pod(own, self.arguments, environment))
        return self.started[-1]

    def kill(self) -> None:
        """Kills what is left; the processes of a pod die with its entry."""
        for pod in self.started:
            pod.process.kill()
            pod.process.wait()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Makes jobs, and kills them all in the end."""
    made = itertools.count()
    with contextlib.ExitStack() as stack:

        def make(pods: int, task: str, worker: str | None = None) -> Job:
            job = Job(tmp_path / f"job-{next(made)}", pods, task, worker)
            stack.callback(job.kill)
            return job

        yield make


def unruly(folder: Path, do: dict[int, str], *, joins: bool = False) -> str:
    """The task of `unruly`."""
    return json.dumps({"folder": str(folder), "do": do, "joins": joins})
