"""One process of a training job, as torchrun starts it; leaves a note about how it exited.

torchrun restarts a process that fails, and reports nothing else about it. The note tells
`srccore.cluster.entry` which failures are worth another attempt: a broken connection to another
process (its pod was lost and comes back), and nothing else. An error of the process's own would
occur again.
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
from srccore.training.ranks import is_lost_peer

__all__ = ["NOTES", "STARTED", "Note", "die_with_parent", "supervised"]

NOTES = "SRCCORE_NOTES"
"""The environment variable with the folder for notes."""
STARTED = "started"
"""The file in it that grows by a byte with every process that starts."""
_SET_DEATH_SIGNAL = 1


class Note(Section):
    """How a process failed; there is none if it succeeded or was stopped."""

    is_final: bool
    """Whether another attempt would fail the same way."""
    exit_code: int
    text: str
    """The last line of the pod's log."""

    def leave(self, path: Path | None) -> None:
        """Writes the note, if there is a folder for notes."""
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
            f"Expected {world_size} processes to train together, but WORLD_SIZE is {found}.",
            "Check the number of pods of the job, and the number of processes in each pod.",
        )
    StageTask.from_json(task).run()


def supervised(work: Callable[[], object]) -> int:
    """Does the work in a child process, so that a kill leaves a note as well.

    Args:
        work: The work; it imports torch itself.

    Returns:
        The exit code: 128 + n if signal n killed the child.
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
            # Other processes may be gone, and leaving their group properly could hang.
            os._exit(code)
        return 0
    for number in (signal.SIGTERM, signal.SIGINT):
        # torchrun signals the child, too; this process waits until it exits.
        signal.signal(number, lambda number, _: _forward(child, number))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0 and -code not in (signal.SIGTERM, signal.SIGINT):
        name = signal.Signals(-code).name
        # NCCL aborts a process that has lost a peer.
        Note(
            is_final=-code != signal.SIGABRT,
            exit_code=128 - code,
            text=f"Error: A training process was killed by {name}.",
        ).leave(path)
    elif code > 0 and path and not path.exists():
        text = f"Error: A training process exited with code {code} and left no message."
        Note(is_final=True, exit_code=1, text=text).leave(path)
    return code if code >= 0 else 128 - code


def _forward(child: int, number: int) -> None:
    try:
        os.kill(child, number)
    except ProcessLookupError:
        return


def _done(work: Callable[[], object], path: Path | None) -> int:
    """Does the work and turns an error into a note and an exit code."""
    try:
        work()
    except SystemExit as stop:
        # `run_stage` has printed the error.
        if isinstance(stop.__cause__, UserError):
            Note(is_final=True, exit_code=2, text=f"Error: {stop.__cause__}").leave(path)
        return stop.code if isinstance(stop.code, int) else 1
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        Note(is_final=True, exit_code=2, text=f"Error: {error}").leave(path)
        return 2
    except KeyboardInterrupt:
        # Die from the signal, so that the parent process sees it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except BaseException as error:
        traceback.print_exc()
        last = traceback.format_exception_only(error)[-1].strip()
        Note(is_final=not is_lost_peer(error), exit_code=1, text=f"Error: {last}").leave(path)
        return 1
    return 0


def die_with_parent() -> None:
    """Makes the kernel kill this process when its parent exits; nothing else would."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
