"""Processes of a stage on one machine, and how samples are divided among them.

The process that runs the stage keeps its folder and its journal. Workers load a model, work on
their samples and send back what they found; they end with the stage, so the memory of their GPUs is
free for the next one. Samples are divided in whole batches, and an engine opens the same samples
together in any worker: results do not depend on the number of workers.

A process ends when the one that started it is gone. It is in a process group of its own: Ctrl-C
only reaches the process that started it, which stops the others, and what a worker started itself
(vLLM has processes of its own) is killed with it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from srccore.config import EngineConfig
from srccore.errors import UserError
from srccore.files import full_disk_explained
from srccore.method.engine import Work
from srccore.training.machine import Machine

__all__ = [
    "Job",
    "Sent",
    "Task",
    "default_workers",
    "divide",
    "gpus_of",
    "run_tasks",
    "stop_workers",
    "threads_of_each",
    "visible_gpus",
]

T = TypeVar("T")
R = TypeVar("R")
Job = Callable[[Sequence[Sequence[T]], Work], Iterator[list[R]]]
"""Works on batches of samples: yields what becomes known together, and adds to the work before.
It is pickled, so it is a `functools.partial` of a function of a module."""

Task = Callable[[Callable[[Any], None]], Any]
"""What a process does: gets a function that sends something at once, and returns its result. It is
pickled, as a `Job`."""

_PRELOADED = ["srccore.models.transformers", "srccore.models.policy", "srccore.data.dataset"]
_running: set[Any] = set()
"""The processes that this one has started."""
_MOST_ON_CPU = 8
"""Workers of a run without a GPU that asks for no number: each has the model in memory."""
_EXIT = 60.0
"""Seconds in which a worker that has sent everything must exit; vLLM ends its processes first."""
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Where a container finds its CPU limit: microseconds, or ``max``, in each period of so many."""


def visible_gpus(device: str = "auto") -> list[str]:
    """Lists the GPUs of this process, as ``CUDA_VISIBLE_DEVICES`` names them.

    Args:
        device: ``cpu``, which uses none, ``cuda`` or ``auto``.
    """
    if device == "cpu":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        each = (name.strip() for name in named.split(","))
        # As CUDA reads it: -1, the usual way to hide all, also hides what follows.
        return list(itertools.takewhile(lambda name: name not in ("", "-1"), each))
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def default_workers(device: str, gpus_each: int = 1) -> int:
    """The workers of a run that asks for no number: as many as the GPUs, or one per two cores.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``.
        gpus_each: GPUs that a worker needs.
    """
    if gpus := len(visible_gpus(device)):
        return max(1, gpus // gpus_each)
    return min(_MOST_ON_CPU, max(1, _cores() // 2))


def _cores() -> int:
    """The cores that this process may use, also where a container limits their time."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def gpus_of(machine: Machine, engine: EngineConfig) -> int:
    """Counts the GPUs of a stage that runs an engine.

    Args:
        machine: How the stage is done.
        engine: Its engine.
    """
    gpus = len(visible_gpus(machine.device))
    if not machine.workers:
        return min(gpus, engine.tensor_parallel_size if engine.name == "vllm" else 1)
    return min(gpus, len(machine.workers) * max(1, gpus // (max(machine.workers) + 1)))


def divide(
    job: Job[T, R], batches: Sequence[Sequence[T]], workers: Sequence[int], work: Work
) -> Iterator[list[R]]:
    """Runs a job, in this process or in several others.

    Args:
        job: What to do.
        batches: The samples, in batches that the job's engine computes together.
        workers: Numbers of the worker processes: those of the run, from 0, or all but the first
            of them. Each has its share of the machine's cores and GPUs. Without any, the job is
            done in this process.
        work: Receives what was computed.

    Yields:
        What became known together, in any order.

    Raises:
        UserError: A worker raised one, or was killed.
        RuntimeError: A worker failed; the message has its traceback.
    """
    if not workers:
        yield from job(batches, work)
        return
    shares = [batches[place :: len(workers)] for place in range(len(workers))]
    count = max(workers) + 1
    tasks = {
        number: (functools.partial(_do, job, share), _environment(number, count))
        for number, share in zip(workers, shares, strict=True)
        # A worker without samples would load a model for nothing.
        if share
    }
    for sent in run_tasks("Worker", tasks, "use fewer --workers or smaller batches"):
        found, computed = sent.value
        work.add(computed)
        if not sent.is_result:
            yield found


def _do(
    job: Job[T, R],
    batches: Sequence[Sequence[T]],
    send: Callable[[tuple[list[R], Work]], None],
) -> tuple[list[R], Work]:
    """A job as a task: sends what becomes known, with what was computed for it."""
    work = Work()
    for found in job(batches, work):
        send((found, work.take()))
    return [], work


@dataclass(frozen=True)
class Sent:
    """What a process has sent.

    Attributes:
        number: The number of its task.
        value: What it sent, or the result of its task.
        is_result: Whether it is the result.
    """

    number: int
    value: Any
    is_result: bool


def run_tasks(
    name: str, tasks: Mapping[int, tuple[Task, Mapping[str, str]]], advice: str
) -> Iterator[Sent]:
    """Runs tasks, each in a process of its own, until all are done or one fails.

    Args:
        name: What an error calls a process: ``Worker``.
        tasks: By number, what to do and the environment variables to do it with, one of which is
            ``OMP_NUM_THREADS``.
        advice: How to use less memory, for the error if a process was killed.

    Yields:
        What the processes send, as it comes in.

    Raises:
        UserError: A process raised one, or was killed.
        RuntimeError: A process failed; the message has its traceback.
    """
    with contextlib.ExitStack() as running:
        connections: dict[Connection, tuple[int, Any]] = {}
        for number, (task, environment) in tasks.items():
            connection, process = running.enter_context(_started(task, environment))
            connections[connection] = number, process
        started = [process for _, process in connections.values()]
        while connections:
            for ready in wait(list(connections)):
                assert isinstance(ready, Connection)
                number, process = connections[ready]
                try:
                    kind, value = ready.recv()
                except (EOFError, OSError):
                    process.join()
                    raise _killed(f"{name} {number}", process.exitcode, advice) from None
                if kind == "sent":
                    yield Sent(number, value, is_result=False)
                elif kind == "done":
                    del connections[ready]
                    yield Sent(number, value, is_result=True)
                elif kind == "refused":
                    raise UserError(*value)
                else:
                    raise RuntimeError(f"{name} {number} failed.\n{value}")
        for process in started:
            process.join(_EXIT)


@atexit.register
def stop_workers() -> None:
    """Kills all processes that this one has started; what waits for them fails.

    Also when the process exits, since Python would wait for them.
    """
    for process in list(_running):
        _kill(process)


def _kill(process: Any) -> None:
    """Kills a process and all that it has started.

    One that ended by itself has waited for what it started, and its number may be another's by now.
    """
    if process.pid is not None and process.exitcode != 0:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        # It may not have its process group yet.
        process.kill()


def _environment(number: int, count: int) -> dict[str, str]:
    """What a worker sees of the machine: its share of the cores and of the GPUs.

    Args:
        number: The worker's number, from 0.
        count: The workers of the run.
    """
    found = {"OMP_NUM_THREADS": str(threads_of_each(count))}
    if gpus := visible_gpus():
        each = max(1, len(gpus) // count)
        first = number * each % len(gpus)
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + each])
    return found


def threads_of_each(count: int) -> int:
    """The CPU threads of each of several processes that work at the same time.

    Args:
        count: The number of processes.
    """
    # OpenMP takes a number for each level of nesting: 4,1.
    named = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    threads = int(named) if named.isdigit() else 0
    return threads or max(1, _cores() // count)


def _killed(name: str, code: int | None, advice: str) -> UserError:
    how = f"exited with code {code}"
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    return UserError(
        f"{name} {how}.",
        f"It may have run out of memory: {advice}. The same command resumes the run.",
    )


@contextlib.contextmanager
def _started(task: Task, environment: Mapping[str, str]) -> Iterator[tuple[Connection, Any]]:
    """Starts a process, and stops it when the block ends."""
    # Forked from a server that has imported torch: a process that has used it must not fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    # Not a daemon: an engine may have processes of its own.
    process = context.Process(target=_live, args=(task, environment, sender))
    _running.add(process)
    try:
        # Ctrl-C may come at any time, also before the next line.
        process.start()
        sender.close()
        yield receiver, process
    finally:
        _running.discard(process)
        _kill(process)
        if process.pid is not None:
            process.join(10)
        receiver.close()


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone; the server between them stays."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _live(task: Task, environment: Mapping[str, str], sender: Connection) -> None:
    """The life of a process."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        with full_disk_explained():
            sender.send(("done", task(lambda value: sender.send(("sent", value)))))
        return
    except UserError as error:
        sender.send(("refused", (error.what, error.fix)))
    except Exception:
        sender.send(("failed", traceback.format_exc()))
    # It is killed now. If it ended, those connected to it would fail before that, less clearly.
    threading.Event().wait()
