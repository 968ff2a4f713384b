"""Divides the samples of a stage among worker processes on one machine.

The process that runs the stage keeps its folder and its journal. Workers load a model, work on
their samples and send back what they found; they end with the stage, so the memory of their GPUs is
free for the next one. Samples are divided in whole batches, and an engine opens the same samples
together in any worker: results do not depend on the number of workers.

A worker ends when the process that started it is gone. It ignores Ctrl-C, which reaches the whole
process group: the process that started it gets it, too, and stops its workers.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from srccore.errors import UserError
from srccore.method.engine import Work

__all__ = ["Job", "default_workers", "divide", "stop_workers", "visible_gpus"]

T = TypeVar("T")
R = TypeVar("R")
Job = Callable[[Sequence[T], Work], Iterator[list[R]]]
"""Works on samples: yields what becomes known together, and adds to the work at the end. It is
pickled, so it is a `functools.partial` of a function of a module."""

_PRELOADED = ["srccore.models.transformers", "srccore.models.policy", "srccore.data.dataset"]
_running: set[Any] = set()
"""The workers of this process."""


def visible_gpus() -> list[str]:
    """Lists the GPUs of this process, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each.strip() for each in named.split(",") if each.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def default_workers(device: str) -> int:
    """The workers of a run that asks for no number: one per GPU, or per two cores.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``.
    """
    gpus = 0 if device == "cpu" else len(visible_gpus())
    return gpus or max(1, _cores() // 2)


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def divide(
    job: Job[T, R], items: Sequence[T], batch: int, workers: Sequence[int], work: Work
) -> Iterator[list[R]]:
    """Runs a job, in this process or in several others.

    Args:
        job: What to do.
        items: The samples, in the order of the batches.
        batch: Items that must stay together: those that the job's engine opens together.
        workers: Numbers of the worker processes, each of which has its own GPU, if there are any;
            none works in this process.
        work: Receives what was computed.

    Yields:
        What became known together, in any order.

    Raises:
        UserError: A worker raised one, or was killed.
        RuntimeError: A worker failed; the message has its traceback.
    """
    if not workers:
        yield from job(items, work)
        return
    batches = [items[start : start + batch] for start in range(0, len(items), batch)]
    shares = [
        [item for together in batches[place :: len(workers)] for item in together]
        for place in range(len(workers))
    ]
    # A worker without samples would load a model for nothing.
    shared = [(number, share) for number, share in zip(workers, shares, strict=True) if share]
    with contextlib.ExitStack() as running:
        connections: dict[Connection, tuple[int, Any]] = {}
        for number, share in shared:
            connection, process = running.enter_context(
                _started(functools.partial(job, share), _environment(number, len(workers)))
            )
            connections[connection] = number, process
        while connections:
            for ready in wait(list(connections)):
                assert isinstance(ready, Connection)
                number, process = connections[ready]
                try:
                    kind, value = ready.recv()
                except (EOFError, OSError):
                    process.join()
                    raise _killed(number, process.exitcode) from None
                if kind == "found":
                    yield value
                elif kind == "done":
                    work.add(value)
                    del connections[ready]
                elif kind == "refused":
                    raise UserError(*value)
                else:
                    raise RuntimeError(f"Worker {number} failed.\n{value}")


@atexit.register
def stop_workers() -> None:
    """Kills all workers of this process; what waits for them fails.

    Also when the process exits, since Python would wait for them.
    """
    for process in list(_running):
        if process.pid is not None:
            process.kill()


def _environment(number: int, count: int) -> dict[str, str]:
    """What a worker sees of the machine: one GPU, and its share of the cores."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // count))
    found = {"OMP_NUM_THREADS": threads}
    if gpus := visible_gpus():
        found["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return found


def _killed(number: int, code: int | None) -> UserError:
    how = f"exited with code {code}"
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    return UserError(
        f"Worker {number} {how}.",
        "It may have run out of memory: use fewer --workers or a smaller batch_size. The same "
        "command resumes the run.",
    )


@contextlib.contextmanager
def _started(
    job: Callable[[Work], Iterator[Any]], environment: Mapping[str, str]
) -> Iterator[tuple[Connection, Any]]:
    """Starts a worker, and stops it when the block ends."""
    # Forked from a server that has imported torch: a process that has used it must not fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    # Not a daemon: an engine may have processes of its own.
    process = context.Process(target=_work, args=(job, environment, sender))
    _running.add(process)
    try:
        # Ctrl-C may come at any time, also before the next line.
        process.start()
        sender.close()
        yield receiver, process
    finally:
        _running.discard(process)
        if process.pid is not None:
            # One that has sent everything is only about to exit.
            process.terminate()
            process.join(10)
            process.kill()
        receiver.close()


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone; the server between them stays."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(
    job: Callable[[Work], Iterator[Any]], environment: Mapping[str, str], sender: Connection
) -> None:
    """The life of a worker."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    work = Work()
    try:
        for found in job(work):
            sender.send(("found", found))
        sender.send(("done", work))
    except UserError as error:
        sender.send(("refused", (error.what, error.fix)))
    except Exception:
        sender.send(("failed", traceback.format_exc()))
