"""Server programs: each is started with a log, recorded in a file, and noticed when it exits.

A record identifies a process by its id and its start time in the kernel, so that a reused id is
not mistaken for ours. A variable in their environment finds processes whose record was never
written. So a later process can stop everything that a killed one left running.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

MARK = "SRCCORE_TEST_CLUSTER"
"""The environment variable with the folder, in every program of a cluster and its children."""
TAIL = 20
"""How many lines of a log an error includes."""
POLL = 0.05


class ClusterError(Exception):
    """Why the test cluster cannot do something, and where to look."""


class MissingError(ClusterError):
    """What this machine lacks, and how to get it."""


class Programs:
    """The programs of one cluster.

    Args:
        folder: The folder for run/, with a record of every program, and logs/.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.logs = folder / "logs"
        self._records = folder / "run"
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str | Path]) -> None:
        """Starts a program that outlives this process unless it is stopped."""
        words = [str(word) for word in command]
        self.logs.mkdir(parents=True, exist_ok=True)
        self._records.mkdir(parents=True, exist_ok=True)
        with self._log(name).open("ab") as log:
            log.write(f"$ {shlex.join(words)}\n".encode())
            log.flush()
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**_without_proxies(), MARK: str(self._folder)},
                cwd=self._records,
                start_new_session=True,  # Ctrl-C only goes to the tests
            )
        self._children[name] = child
        record = {"pid": child.pid, "began": _began(child.pid), "command": words}
        aside = self._record(name).with_suffix(".new")
        aside.write_text(json.dumps(record), encoding="utf-8")
        aside.replace(self._record(name))

    def start_again(self, name: str) -> None:
        """Starts a stopped program again, in the same way."""
        self.start(name, json.loads(self._record(name).read_text("utf-8"))["command"])

    def stop(self, name: str) -> None:
        """Kills a program and waits until it has exited; its record stays."""
        if self.is_running(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid(name), signal.SIGKILL)
        if child := self._children.pop(name, None):
            child.wait()
        wait_until(f"{name} ends", lambda: not self.is_running(name), within=30)

    def stop_all(self, first: Sequence[str] = ()) -> None:
        """Kills all programs, the given ones first, and deletes their records."""
        names = self.names()
        for name in [*(name for name in first if name in names), *names]:
            self.stop(name)
            self._record(name).unlink(missing_ok=True)
        for pid in self._marked():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def names(self) -> list[str]:
        """The programs that have a record."""
        return sorted(path.stem for path in self._records.glob("*.json"))

    def is_running(self, name: str) -> bool:
        try:
            record = json.loads(self._record(name).read_text("utf-8"))
        except FileNotFoundError:
            return False
        return record["began"] is not None and _began(record["pid"]) == record["began"]

    def ended(self) -> list[str]:
        """Describes every program that has exited by itself, with the end of its log."""
        codes = {name: child.poll() for name, child in self._children.items()}
        return [
            f"{name} exited with {code}. {self._log_end(name)}"
            for name, code in codes.items()
            if code is not None
        ]

    def wait_until(self, what: str, ready: Callable[[], bool], within: float = 60) -> None:
        """Waits for a condition, and gives up early if a program exits.

        Args:
            what: The condition, as a sentence: ``etcd answers``.
            ready: Whether it is true.
            within: The time limit in seconds.

        Raises:
            ClusterError: A program has exited, or the time is over.
        """

        def ready_or_dead() -> bool:
            if ended := self.ended():
                raise ClusterError("\n".join(ended))
            return ready()

        wait_until(what, ready_or_dead, within, f"The logs are in {self.logs}.")

    def _log_end(self, name: str) -> str:
        log = self._log(name)
        lines = log.read_text("utf-8", errors="replace").splitlines()[-TAIL:]
        return "\n  ".join([f"Last lines of {log}:", *lines])

    def _marked(self) -> list[int]:
        mark = f"{MARK}={self._folder}".encode()
        return [pid for pid in process_ids() if mark in _environment(pid)]

    def _pid(self, name: str) -> int:
        return int(json.loads(self._record(name).read_text("utf-8"))["pid"])

    def _record(self, name: str) -> Path:
        return self._records / f"{name}.json"

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"


def wait_until(what: str, ready: Callable[[], bool], within: float = 60, then: str = "") -> None:
    """Waits for a condition.

    Args:
        what: The condition, as a sentence: ``the pod runs``.
        ready: Whether it is true.
        within: The time limit in seconds.
        then: What to add to the message when the time is over.

    Raises:
        ClusterError: The time is over.
    """
    deadline = time.monotonic() + within
    while not ready():
        if time.monotonic() > deadline:
            raise ClusterError(f"Not within {within:.0f} s: {what}. {then}".rstrip())
        time.sleep(POLL)


def process_ids() -> list[int]:
    """All processes of this machine."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or of another user
        return []


def _began(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; None if it does not exist."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may contain anything
    return None if fields[0] in "ZX" else int(fields[19])


def _without_proxies() -> dict[str, str]:
    """All traffic of a cluster stays on this machine."""
    return {name: value for name, value in os.environ.items() if name[-6:].lower() != "_proxy"}
