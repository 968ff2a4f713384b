"""Builds the server programs of the tests: ``python -m tests.cluster.build``.

tools/ is a Go module that pins them with all they are built from; every import of its tools.go is
one program. They go to cache/<hash>/bin, where the hash is of go.sum and of the Go that builds,
so that a change of either builds anew and nothing else does. Assumes a Go that is new enough for
go.mod, and a module proxy or a filled module cache.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
TOOLS = HERE / "tools"
CACHE = HERE / "cache"


class BuildError(Exception):
    """Why nothing can be built, and what to do about it."""


def program(name: str) -> Path | None:
    """The program of that name; None where it is not built."""
    try:
        path = _folder() / name
    except BuildError:
        return None
    return path if os.access(path, os.X_OK) else None


def build() -> Path:
    """Builds what is pinned and not there yet; returns the folder of the programs.

    Raises:
        BuildError: Go is missing or too old, or a build fails.
    """
    folder = _folder()
    missing = [path for path in _pinned() if program(_name(path)) is None]
    if not missing:
        print(f"{folder}: all built")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for package in missing:
        print(f"building {package}: minutes where Go's own cache is empty", flush=True)
        began = time.monotonic()
        # Built aside and renamed: an interrupted build leaves no half program.
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            built = Path(aside) / _name(package)
            options = ["-mod=readonly", "-trimpath", "-buildvcs=false"]
            command = ["go", "build", *options, "-o", str(built), package]
            if subprocess.run(command, cwd=TOOLS, check=False).returncode != 0:
                raise BuildError(f"{package} was not built; what Go says stands above.")
            built.rename(folder / built.name)
        print(f"{folder / _name(package)}: built in {time.monotonic() - began:.0f} s")
    return folder


@functools.cache
def _folder() -> Path:
    pins = hashlib.sha256((TOOLS / "go.sum").read_bytes() + _go_version().encode())
    return CACHE / pins.hexdigest()[:16] / "bin"


def _go_version() -> str:
    needed = _needed_version()
    mend = f"Install Go {needed} or newer (https://go.dev/doc/install) and put it on the PATH."
    if shutil.which("go") is None:
        raise BuildError(f"Go is not installed. {mend}")
    # Asked in the module's folder, where a Go that may fetch a newer one answers with that.
    asked = subprocess.run(
        ["go", "env", "GOVERSION"], cwd=TOOLS, check=False, capture_output=True, text=True
    )
    found = asked.stdout.strip()
    if asked.returncode != 0 or _numbers(found) < _numbers(needed):
        raise BuildError(f"{found or 'This Go'} is too old. {mend}")
    return found


def _needed_version() -> str:
    (found,) = re.findall(r"^go (\S+)$", (TOOLS / "go.mod").read_text("utf-8"), re.MULTILINE)
    return str(found)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _pinned() -> list[str]:
    return re.findall(r'^\s*_ "(.+)"$', (TOOLS / "tools.go").read_text("utf-8"), re.MULTILINE)


def _name(package: str) -> str:
    return package.rpartition("/")[2]


if __name__ == "__main__":
    try:
        build()
    except BuildError as error:
        sys.exit(f"Error: {error}")
