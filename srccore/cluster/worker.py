"""One process of a training job, as torchrun starts it; leaves a note of how it ended.

torchrun restarts a process that ends badly, and says no more of it than that. A note tells
`srccore.cluster.entry` which ends are worth another attempt: a connection to another process that
broke (its pod is gone and comes back), and nothing else. What a process raised by itself, it would
raise again.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from srccore.config import Section
from srccore.errors import UserError
from srccore.files import write_json

__all__ = ["NOTES", "STARTED", "Note", "die_with_parent", "is_lost_peer", "supervised"]

NOTES = "SRCCORE_NOTES"
"""The environment variable that names the folder for notes."""
STARTED = "started"
"""The file in it that grows by a byte with every process that starts."""
_SET_DEATH_SIGNAL = 1
# How gloo, and autograd over it, say that a peer is gone: a plain RuntimeError.
_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer")


class Note(Section):
    """How a process ended, unless it ended well or was told to end."""

    is_final: bool
    """Whether another attempt would end the same way."""
    exit_code: int
    text: str
    """What the pod's log shall end with."""

    def leave(self, path: Path | None) -> None:
        """Writes it down, where somebody reads notes."""
        if path:
            write_json(path, self.model_dump(mode="json"))


def main() -> int:
    """Runs a task as one of several processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--task", required=True)
    given = parser.parse_args()
    return supervised(lambda: _train(given.task, given.world_size))


def _train(task: str, world_size: int) -> None:
    from srccore.cluster.task import StageTask

    found = int(os.environ.get("WORLD_SIZE", "1"))
    if found != world_size:
        raise UserError(
            f"{found} processes were started to train together, but {world_size} were asked for.",
            "See the job's number of pods, and of processes in each.",
        )
    StageTask.from_json(task).run()


def supervised(work: Callable[[], object]) -> int:
    """Does the work in a child process, so that even its killing is noted.

    Args:
        work: What to do; it imports torch itself.

    Returns:
        The exit code: 128 + n where signal n killed the child.
    """
    die_with_parent()
    path = None
    if folder := os.environ.get(NOTES):
        path = Path(folder) / f"{os.getpid()}.json"
        with (Path(folder) / STARTED).open("ab") as file:
            file.write(b".")
    child = os.fork()
    if child == 0:
        die_with_parent()
        if code := _done(work, path):
            sys.stdout.flush()
            sys.stderr.flush()
            # The other processes may be gone: leaving their group in good order could hang.
            os._exit(code)
        return 0
    for number in (signal.SIGTERM, signal.SIGINT):
        # torchrun tells the child, too; this process waits for its end.
        signal.signal(number, lambda number, _: _tell(child, number))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0 and -code not in (signal.SIGTERM, signal.SIGINT):
        name = signal.Signals(-code).name
        # NCCL aborts a process whose peer is gone.
        Note(
            is_final=-code != signal.SIGABRT,
            exit_code=128 - code,
            text=f"Error: A process that trains was killed by {name}.",
        ).leave(path)
    elif code > 0 and path and not path.exists():
        text = f"Error: A process that trains ended with exit code {code}, without a word."
        Note(is_final=True, exit_code=1, text=text).leave(path)
    return code if code >= 0 else 128 - code


def _tell(child: int, number: int) -> None:
    try:
        os.kill(child, number)
    except ProcessLookupError:
        return


def _done(work: Callable[[], object], path: Path | None) -> int:
    """Does the work; an error becomes a note and an exit code."""
    try:
        work()
    except SystemExit as stop:
        # `run_stage` has told the user.
        if isinstance(stop.__cause__, UserError):
            Note(is_final=True, exit_code=2, text=f"Error: {stop.__cause__}").leave(path)
        return stop.code if isinstance(stop.code, int) else 1
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        Note(is_final=True, exit_code=2, text=f"Error: {error}").leave(path)
        return 2
    except KeyboardInterrupt:
        # An end by signal, for whoever waits for this process.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except BaseException as error:
        traceback.print_exc()
        last = traceback.format_exception_only(error)[-1].strip()
        Note(is_final=not is_lost_peer(error), exit_code=1, text=f"Error: {last}").leave(path)
        return 1
    return 0


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that a connection to another process broke.

    Args:
        error: What was raised; its causes count too.
    """
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    found: BaseException | None = error
    while found is not None:
        if isinstance(found, dist.DistError):
            return True
        if isinstance(found, RuntimeError) and any(sign in str(found) for sign in _LOST):
            return True
        found = found.__cause__ or found.__context__
    return False


def die_with_parent() -> None:
    """Has the kernel kill this process when the one that started it ends: nobody else would."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
