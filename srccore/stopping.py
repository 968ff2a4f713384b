"""How a process ends that Kubernetes asks to stop: with SIGTERM, and with SIGKILL a while later.

What is open is closed first: a journal publishes its last part, workers and engines end. The exit
code is 143, which says that nothing was wrong: 0 is done, 2 is an error that the user can fix, and
1 is any other. Assumes that a pod has the usual 30 seconds between the two signals.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["PREEMPTED", "deferred", "stoppable"]

PREEMPTED = 128 + signal.SIGTERM
"""The exit code after SIGTERM: 143."""
_NOTE = b"\nStopped by SIGTERM. What is done is kept.\n"
_deferring: list[Callable[[], None]] = []
"""What the blocks of `deferred` want to be called with, the innermost last."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Makes SIGTERM end the process with `PREEMPTED`, through all that is open.

    Only the main thread can receive signals: in another one, this changes nothing.

    Raises:
        SystemExit: In the block, wherever it is when SIGTERM arrives. Later ones are ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Not print: the block may be in the middle of one.
        os.write(2, _NOTE)
        if not _deferring:
            raise SystemExit(PREEMPTED)
        _deferring[-1]()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def deferred(wind_up: Callable[[], object]) -> Iterator[None]:
    """Lets a block finish what it has begun before SIGTERM ends the process.

    Args:
        wind_up: Called by the signal's handler; the block must then end within seconds.

    Raises:
        SystemExit: At the end of the block, if SIGTERM arrived in it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_stopping = False

    def stop() -> None:
        nonlocal is_stopping
        is_stopping = True
        wind_up()

    _deferring.append(stop)
    try:
        yield
    finally:
        _deferring.remove(stop)
    if is_stopping:
        raise SystemExit(PREEMPTED)
