"""A stage's output folder: what went in, what came out, and whether it is finished.

A folder opens with ``stage.json`` (the key: a hash of all that went in) and is finished by
``manifest.json``, written last. A finished folder of the same key is not made again; an unfinished
one goes on from what it holds; a folder of another key is never touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

import srccore
from srccore.config import identity
from srccore.errors import UserError
from srccore.files import JOURNAL, MANIFEST, STARTED, writable, write_json

__all__ = [
    "Manifest",
    "StageFolder",
    "hash_input",
    "read_manifest",
]

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "numpy")


class Manifest(BaseModel):
    """What a finished stage says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    stage: str
    key: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Hash of each input."""
    outputs: dict[str, str]
    """Hash of each file written, by its path in the folder."""
    figures: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    peak_memory_mb: float
    """Greatest resident memory of the process while the stage ran, in MiB; where the kernel
    cannot tell (it is not Linux's), since the process began."""


class StageFolder:
    """The output folder of one stage, from its beginning to its manifest."""

    def __init__(
        self,
        stage: str,
        out: Path,
        *,
        config: BaseModel | None = None,
        inputs: Mapping[str, Path | str | None] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the folder, or refuses it.

        Args:
            stage: The stage's name.
            out: The folder; made where it is missing.
            config: The stage's configuration.
            inputs: Files and folders that are read (hashed), or texts that name something; None
                is an input that was not given.
            settings: Further arguments on which the output depends.

        Raises:
            UserError: An input is missing, the folder belongs to something else, or it cannot be
                written.
        """
        self.stage = stage
        self.path = out
        self._config = {**(identity(config) if config else {}), **(settings or {})}
        self._inputs = {
            name: hash_input(name, value)
            for name, value in (inputs or {}).items()
            if value is not None
        }
        self._key = _digest(
            json.dumps([stage, srccore.__version__, self._config, self._inputs], sort_keys=True)
        )
        self._began = time.monotonic()
        _count_peak_memory_anew()
        self.manifest = self._open()

    @property
    def figures(self) -> dict[str, Any] | None:
        """The figures of a finished stage; None where there is work to do."""
        return self.manifest.figures if self.manifest else None

    def _open(self) -> Manifest | None:
        started = self.path / STARTED
        with writable(self.path):
            if started.exists():
                found = json.loads(started.read_text(encoding="utf-8")).get("key")
            elif self.path.exists() and any(self.path.iterdir()):
                found = None
            else:
                self.path.mkdir(parents=True, exist_ok=True)
                write_json(started, {"stage": self.stage, "key": self._key})
                return None
        if found != self._key:
            raise UserError(
                f"The folder {self.path} holds something else than {self.stage} of these inputs "
                "and this configuration.",
                "Give another folder, or delete this one; nothing was changed.",
            )
        path = self.path / MANIFEST
        return read_manifest(self.path) if path.exists() else None

    def finish(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the manifest, last of all.

        Args:
            figures: What the stage tells of its work.

        Returns:
            The figures, as JSON keeps them.
        """
        outputs = {
            str(path.relative_to(self.path)): _hash_file(path)
            for path in sorted(self.path.rglob("*"))
            if path.is_file()
            and path.name not in (MANIFEST, STARTED, JOURNAL)
            and path.suffix != ".tmp"
        }
        self.manifest = Manifest(
            stage=self.stage,
            key=self._key,
            config=self._config,
            inputs=self._inputs,
            outputs=outputs,
            figures=json.loads(json.dumps(figures)),
            versions=_versions(),
            seconds=round(time.monotonic() - self._began, 3),
            peak_memory_mb=_peak_memory_mb(),
        )
        write_json(self.path / MANIFEST, self.manifest.model_dump(mode="json"))
        return self.manifest.figures


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a finished stage.

    Raises:
        UserError: There is none, or it is not one.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        raise UserError(
            f"{folder} is no finished stage: its {MANIFEST} is missing or not readable.",
            "Run the stage that makes it to its end first.",
        ) from None


def hash_input(name: str, value: Path | str) -> str:
    """Hashes what goes into a stage.

    Args:
        name: What it is, for the error.
        value: A folder, a file, or a text that names something.

    Returns:
        A finished stage's folder by its outputs, other files by their bytes, a text as it stands.

    Raises:
        UserError: There is no such file or folder.
    """
    if isinstance(value, str):
        return value
    if (value / STARTED).is_file():
        return _digest(json.dumps(read_manifest(value).outputs, sort_keys=True))
    if value.is_file():
        if all((value.parent / name).is_file() for name in (STARTED, MANIFEST)):
            known = read_manifest(value.parent).outputs.get(value.name)
            if known:
                return known
        return _hash_file(value)
    if value.is_dir():
        # A checkpoint is the same whatever its card says.
        files = sorted(p for p in value.rglob("*") if p.is_file() and p.name != "README.md")
        return _digest("\n".join(f"{path.relative_to(value)} {_hash_file(path)}" for path in files))
    raise UserError(f"The input {name} is missing: {value}.", "Check the path.")


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _count_peak_memory_anew() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_memory_mb() -> float:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        (peak,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 1024
    except (OSError, ValueError):
        peak_ever = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak_ever / (2**20 if sys.platform == "darwin" else 1024)


def _versions() -> dict[str, str]:
    versions = {"srccore": srccore.__version__, "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
