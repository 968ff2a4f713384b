"""Runs the tests of ``make test`` in two processes side by side: ``python tests/run.py OPTION...``.

Options are passed on to pytest. The output of the first part is shown as it comes, that of the
second after it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import IO, Any

PIPELINE = "tests/local/test_pipeline_local.py"
# Each takes about the same time, and the tests that share a finished run are in one part.
PARTS = (
    ("tests/local", f"--ignore={PIPELINE}"),
    ("tests/compile", "tests/unit", "tests/awkward", PIPELINE),
)
# Otherwise, the threads of one process wait for those of the other.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def main(options: list[str]) -> int:
    """Runs both parts, and returns 1 if either fails."""
    with tempfile.TemporaryFile() as output:
        print(f"== {' '.join(PARTS[0])}", flush=True)
        running = [start(PARTS[0], options, None), start(PARTS[1], options, output)]
        # The terminal sends Ctrl-C to both parts too; each then prints what it has found.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(
            signal.SIGTERM, lambda *_: [part.send_signal(signal.SIGINT) for part in running]
        )
        codes = [part.wait() for part in running]
        print(f"== {' '.join(PARTS[1])}", flush=True)
        output.seek(0)
        shutil.copyfileobj(output, sys.stdout.buffer)
    return int(any(codes))


def start(part: tuple[str, ...], options: list[str], output: IO[bytes] | None) -> Any:
    command = [sys.executable, "-m", "pytest", *options, *part]
    environment = os.environ | ENVIRONMENT
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
