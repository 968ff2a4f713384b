"""Server programs: started with a log each, recorded in files, noticed when they end.

A record names a process by its id and by when the kernel says that it began: an id that has been
given to another process since is nobody of ours. A mark in their environment finds those whose
record was never written. So any later process can stop what outlived one that was killed.
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
"""The variable that every program of a cluster, and what it starts, finds the folder in."""
TAIL = 20
"""Lines of a log that an error shows."""
POLL = 0.05


class ClusterError(Exception):
    """Why the test cluster cannot do what it was asked, and where to look."""


class MissingError(ClusterError):
    """What this machine lacks, and how to get it."""


class Programs:
    """The programs of one cluster.

    Args:
        folder: Gets run/, with a record of every program, and logs/.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.logs = folder / "logs"
        self._records = folder / "run"
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str | Path]) -> None:
        """Starts a program that outlives this process if nobody stops it."""
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
                start_new_session=True,  # an interrupt from the keyboard is for the tests alone
            )
        self._children[name] = child
        record = {"pid": child.pid, "began": _began(child.pid), "command": words}
        aside = self._record(name).with_suffix(".new")
        aside.write_text(json.dumps(record), encoding="utf-8")
        aside.replace(self._record(name))

    def start_again(self, name: str) -> None:
        """Starts a program that was stopped, as it was started before."""
        self.start(name, json.loads(self._record(name).read_text("utf-8"))["command"])

    def stop(self, name: str) -> None:
        """Kills a program and waits for its end; its record stays."""
        if self.is_running(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid(name), signal.SIGKILL)
        if child := self._children.pop(name, None):
            child.wait()
        wait_until(f"{name} ends", lambda: not self.is_running(name), within=30)

    def stop_all(self, first: Sequence[str] = ()) -> None:
        """Kills all programs, those named before the others, and forgets them."""
        names = self.names()
        for name in [*(name for name in first if name in names), *names]:
            self.stop(name)
            self._record(name).unlink(missing_ok=True)
        for pid in self._marked():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def names(self) -> list[str]:
        """The programs that were started and not forgotten."""
        return sorted(path.stem for path in self._records.glob("*.json"))

    def is_running(self, name: str) -> bool:
        try:
            record = json.loads(self._record(name).read_text("utf-8"))
        except FileNotFoundError:
            return False
        return record["began"] is not None and _began(record["pid"]) == record["began"]

    def ended(self) -> list[str]:
        """What there is to say of every program that has ended by itself, with its log's end."""
        codes = {name: child.poll() for name, child in self._children.items()}
        return [
            f"{name} has ended with {code}. {self._log_end(name)}"
            for name, code in codes.items()
            if code is not None
        ]

    def wait_until(self, what: str, ready: Callable[[], bool], within: float = 60) -> None:
        """Waits, and gives up early if a program ends meanwhile.

        Args:
            what: What is waited for, as a sentence: ``etcd answers``.
            ready: Whether it is so.
            within: Seconds.

        Raises:
            ClusterError: A program has ended, or the time is over.
        """

        def ready_or_dead() -> bool:
            if ended := self.ended():
                raise ClusterError("\n".join(ended))
            return ready()

        wait_until(what, ready_or_dead, within, f"The logs are in {self.logs}.")

    def _log_end(self, name: str) -> str:
        log = self._log(name)
        lines = log.read_text("utf-8", errors="replace").splitlines()[-TAIL:]
        return "\n  ".join([f"The end of {log}:", *lines])

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
    """Waits until something is so.

    Args:
        what: What is waited for, as a sentence: ``the pod runs``.
        ready: Whether it is so.
        within: Seconds.
        then: What to say besides when the time is over.

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
    except OSError:  # gone, or another user's
        return []


def _began(pid: int) -> int | None:
    """When a process began, in ticks since the machine did; None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


def _without_proxies() -> dict[str, str]:
    """All traffic of a cluster stays on this machine."""
    return {name: value for name, value in os.environ.items() if name[-6:].lower() != "_proxy"}
