"""Builds the server programs of the tests: ``python -m tests.cluster.build [PROGRAM ...]``.

Every folder under tools/ is a group: a Go module that pins one or more programs with all of their
dependencies. The groups are separate because the programs need different versions of the same
libraries. The only program of a group has the group's name; several have their packages' names.
They are written to cache/built/<group>-<hash>, where the hash covers the group's files and the Go
version, so that a change of one group rebuilds that group only. To change the version of a
program, run ``go get PACKAGE@VERSION`` and ``go mod tidy`` in its group's folder.

Assumes a Go that is new enough for go.mod, and a module proxy or a filled module cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
TOOLS = HERE / "tools"
CACHE = HERE / "cache"
BUILT = CACHE / "built"
COMMAND = "python -m tests.cluster.build"


class BuildError(Exception):
    """Why the programs cannot be built, and what to do about it."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Programs that one Go module pins."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def module(self) -> str:
        """The module that the programs come from: the first requirement."""
        return _only(r"^require (\S+) ", self.folder / "go.mod")

    @property
    def version(self) -> str:
        return _only(r"^require \S+ (\S+)", self.folder / "go.mod")

    @property
    def packages(self) -> dict[str, str]:
        """The package of every program, by the program's name."""
        if (self.folder / "main.go").exists():
            return {self.name: "."}
        tools = (self.folder / "tools.go").read_text("utf-8")
        found = re.findall(r'^\s*_ "(.+)"$', tools, re.MULTILINE)
        if len(found) == 1:
            return {self.name: found[0]}
        return {package.rpartition("/")[2]: package for package in found}

    @property
    def built(self) -> Path:
        """The folder for its built programs.

        Raises:
            BuildError: Go is missing or too old.
        """
        pins = hashlib.sha256(" ".join([_go_version(self.folder), *self._options()]).encode())
        for file in sorted(self.folder.iterdir()):
            pins.update(file.name.encode() + b"\0" + file.read_bytes())
        return BUILT / f"{self.name}-{pins.hexdigest()[:16]}"

    def build(self) -> None:
        """Builds all of its programs, or none.

        Raises:
            BuildError: The build fails.
        """
        # Built in a separate folder and then renamed: an interrupted build leaves no partial group.
        aside = BUILT / "building"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        packages = self.packages
        to = aside / self.name if len(packages) == 1 else aside
        command = ["go", "build", *self._options(), "-o", str(to), *packages.values()]
        # Without C the programs are static: they run in an image that contains nothing else.
        environment = {**os.environ, "CGO_ENABLED": "0"}
        if subprocess.run(command, cwd=self.folder, env=environment, check=False).returncode != 0:
            raise BuildError(f"Could not build {self.name}; see the output of Go above.")
        aside.rename(self.built)

    def source(self) -> Path:
        """The folder of the module that the programs come from, with its manifests.

        Raises:
            BuildError: Go is missing, or cannot fetch the module.
        """
        _go_version(self.folder)
        command = ["go", "mod", "download", "-json", self.module]
        asked = subprocess.run(
            command, cwd=self.folder, check=False, capture_output=True, text=True
        )
        if asked.returncode != 0:
            raise BuildError(f"Could not fetch {self.module}: {asked.stdout}{asked.stderr}")
        return Path(json.loads(asked.stdout)["Dir"])

    def _options(self) -> list[str]:
        linked = ["-s", "-w"]
        if self.name == "kubernetes":  # otherwise clients cannot parse the reported version
            linked += ["-X", f"k8s.io/component-base/version.gitVersion={self.version}"]
        return ["-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", " ".join(linked)]


def groups() -> list[Group]:
    """All groups, by name."""
    return [Group(file.parent) for file in sorted(TOOLS.glob("*/go.mod"))]


def group_of(name: str) -> Group:
    """The group of that name, or with a program of that name."""
    for group in groups():
        if name == group.name or name in group.packages:
            return group
    raise BuildError(f"There is no program or group {name} in {TOOLS}.")


def program(name: str) -> Path | None:
    """The program of that name; None if it is not built."""
    try:
        path = group_of(name).built / name
    except BuildError:
        return None
    return path if os.access(path, os.X_OK) else None


def build(*names: str) -> None:
    """Builds the pinned programs that are not built yet.

    Args:
        names: Programs or groups; empty means all.

    Raises:
        BuildError: Go is missing or too old, or a build fails.
    """
    wanted = {group_of(name) for name in names} if names else set(groups())
    BUILT.mkdir(parents=True, exist_ok=True)
    with _alone():
        for group in sorted(wanted, key=lambda group: group.name):
            if group.built.exists():
                print(f"{group.built}: built")
                continue
            print(f"building {group.name}: takes minutes if Go's cache is empty", flush=True)
            began = time.monotonic()
            group.build()
            print(f"{group.built}: built in {time.monotonic() - began:.0f} s", flush=True)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One build at a time: the kernel releases the lock when its holder exits."""
    with (BUILT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def _go_version(folder: Path) -> str:
    needed = _only(r"^go (\S+)$", folder / "go.mod")
    fix = f"Install Go {needed} or newer (https://go.dev/doc/install) and put it on the PATH."
    if shutil.which("go") is None:
        raise BuildError(f"Go is not installed. {fix}")
    # Run in the folder of the module: a Go that may fetch a newer one reports the newer one there.
    asked = subprocess.run(
        ["go", "env", "GOVERSION"], cwd=folder, check=False, capture_output=True, text=True
    )
    found = asked.stdout.strip()
    if asked.returncode != 0 or _numbers(found) < _numbers(needed):
        raise BuildError(f"{found or 'This Go'} is too old. {fix}")
    return found


def _only(pattern: str, file: Path) -> str:
    found = re.search(pattern, file.read_text("utf-8"), re.MULTILINE)
    assert found is not None, (pattern, file)
    return found[1]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


if __name__ == "__main__":
    try:
        build(*sys.argv[1:])
    except BuildError as error:
        sys.exit(f"Error: {error}")
