"""Runs a compiled pipeline on this machine, from its YAML, with a process for each task."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from srccore.errors import UserError
from srccore.files import writable

__all__ = ["LOG", "run_locally"]

LOG = "pipeline.log"
PAGE = "report.html"
_COLOUR = re.compile(r"\x1b\[\d+m")
_TASK = re.compile(
    r"Executing task '(?P<started>[^']+)'|Task '(?P<ended>[^']+)' finished with status "
    r"(?P<status>\w+)|^\s*(?P<error>Error: .+)"
)


def run_locally(
    package: Path, arguments: Mapping[str, Any], out: Path, say: Callable[[str], None] = print
) -> Path:
    """Runs a pipeline with kfp's SubprocessRunner.

    Args:
        package: The compiled pipeline.
        arguments: Its run-time parameters.
        out: The folder for ``kubeflow/`` (what Kubeflow would store, one folder per run),
            ``pipeline.log`` (all output of the tasks) and ``report.html``.
        say: Receives a line when a task ends, and errors.

    Returns:
        The report's path.

    Raises:
        UserError: A task failed.
    """
    from kfp import components, local

    if "python3" in str(out.resolve()):
        raise UserError(
            f"{out} contains the text python3, which kfp's local runner replaces everywhere.",
            "Choose an --out without it.",
        )
    root = out.resolve() / "kubeflow"
    with writable(out):
        root.mkdir(parents=True, exist_ok=True)
    before = set(root.iterdir())
    log = out / LOG
    with (
        log.open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(_Tasks(file, say)),
        warnings.catch_warnings(),
    ):
        # kfp warns about every image and resource setting that a process does not use.
        warnings.simplefilter("ignore")
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root))
        pipeline = components.load_component_from_file(str(package))
        try:
            pipeline(**arguments)
        except RuntimeError as error:
            reason = _COLOUR.sub("", " ".join(str(error).split()))
            raise UserError(
                f"The pipeline failed: {reason}",
                f"The output of its tasks is in {log}. Run the same command to resume {out}.",
            ) from None
    (run,) = set(root.iterdir()) - before
    (page,) = run.rglob("report/page*")
    return Path(shutil.copyfile(page, out / PAGE))


class _Tasks(io.TextIOBase):
    """Writes kfp's output to a file, and passes on what it says about tasks."""

    def __init__(self, log: TextIO, say: Callable[[str], None]) -> None:
        self.log = log
        self.say = say
        self.started: dict[str, float] = {}
        self.rest = ""

    def write(self, text: str) -> int:
        self.log.write(text)
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self._read(_COLOUR.sub("", line))
        return len(text)

    def flush(self) -> None:
        self.log.flush()

    def _read(self, line: str) -> None:
        found = _TASK.search(line)
        if found is None:
            return
        if found["started"]:
            self.started[found["started"]] = time.monotonic()
        elif found["ended"]:
            name = found["ended"]
            seconds = time.monotonic() - self.started.get(name, time.monotonic())
            outcome = "" if found["status"] == "SUCCESS" else f"  {found['status'].lower()}"
            self.say(f"{name:<36} {seconds:8.1f} s{outcome}")
        else:
            self.say(found["error"])
