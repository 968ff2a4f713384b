"""A stage's output folder: whose it is, what has been done, and whether it is finished.

A folder opens with ``stage.json`` (the key: a hash of all that went in) and is finished by
``manifest.json``, written last. A finished folder of the same key is not made again, an unfinished
one resumes from what it has, and a folder of another key is never touched. As long as the
`StageFolder` of an unfinished stage exists, other processes wait for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import resource
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

import srccore
from srccore import storage
from srccore.config import identity
from srccore.data.records import Record
from srccore.errors import UserError
from srccore.files import (
    JOURNAL,
    MANIFEST,
    STARTED,
    Hold,
    hold,
    is_json,
    is_leftover,
    is_private,
    sync,
    writable,
    write_json,
)
from srccore.hashing import hash_file, hash_text
from srccore.method.engine import Work
from srccore.stages import inputs as identify
from srccore.stages.journal import Journal
from srccore.stages.manifest import Manifest, read_manifest
from srccore.stages.parts import Parts
from srccore.stages.table import STAGES, Stage
from srccore.training.machine import Machine
from srccore.training.resume import CHECKPOINTS

__all__ = ["StageFolder"]

R = TypeVar("R", bound=Record)

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "numpy")


class StageFolder:
    """The output folder of one stage, from its beginning to its manifest."""

    def __init__(
        self,
        stage: str | Stage,
        out: Path,
        *,
        config: BaseModel | None = None,
        inputs: Mapping[str, Path | Sequence[Path] | None] | None = None,
        sources: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the folder, or refuses to.

        Args:
            stage: The stage's name in the table, or an entry of your own.
            out: The folder; created if it is missing.
            config: The stage's configuration.
            inputs: The files and folders that the stage's table entry names, or several of one
                name; None is an input that was not given.
            sources: What else identifies the work, as `srccore.stages.inputs` has it.
            settings: Further arguments on which the output depends.

        Raises:
            UserError: An input is missing, the folder belongs to something else, or it cannot be
                written.
        """
        entry = STAGES[stage] if isinstance(stage, str) else stage
        self.stage = entry.name
        self.path = out
        self._config = {**(identity(config) if config else {}), **(settings or {})}
        if unknown := (sources or {}).keys() - entry.sources:
            raise ValueError(f"The stage {entry.name} declares no sources {sorted(unknown)}.")
        self._inputs = {**_identified(entry, inputs or {}), **(sources or {})}
        self._key = hash_text(
            json.dumps([self.stage, entry.version, self._config, self._inputs], sort_keys=True)
        )
        self._began = time.monotonic()
        _reset_peak_memory()
        self._held: Hold | None = None
        self.manifest = self._open()

    @property
    def figures(self) -> dict[str, Any] | None:
        """The figures of a finished stage; None where there is work to do."""
        return self.manifest.figures if self.manifest else None

    def _open(self) -> Manifest | None:
        with writable(self.path):
            if finished := self._finished():
                return finished
            self.path.mkdir(parents=True, exist_ok=True)
            self._held = hold(self.path)
            # Another process may have finished it meanwhile.
            if finished := self._finished():
                return finished
            # Of an attempt that was killed while it wrote a file, or trained.
            for path in list(self.path.rglob("*.tmp")):
                storage.remove(str(path))
            if (self.path / MANIFEST).exists():
                print(
                    f"{self.path / MANIFEST} was not written completely: finishing {self.stage} "
                    "again.",
                    file=sys.stderr,
                )
                (self.path / MANIFEST).unlink()
            if self._found_key() is None:
                write_json(self.path / STARTED, {"stage": self.stage, "key": self._key})
        return None

    def _finished(self) -> Manifest | None:
        """Reads the manifest; None where there is work to do.

        Raises:
            UserError: The folder, or its manifest, belongs to something else.
        """
        if self._found_key() not in (None, self._key):
            raise UserError(
                f"{self.path} already holds the output of a different stage, input or "
                f"configuration than this {self.stage}.",
                f"Choose another --out or delete {self.path}; nothing was changed.",
            )
        if not (self.path / MANIFEST).exists() or not is_json(self.path / MANIFEST):
            return None
        manifest = read_manifest(self.path)
        if (manifest.stage, manifest.key) != (self.stage, self._key):
            raise UserError(
                f"{self.path / MANIFEST} belongs to a different stage, input or configuration "
                f"than {self.path / STARTED}.",
                f"Delete {self.path}, so that the stage is done again; nothing was changed.",
            )
        self._remove_what_was_for_resuming()
        return manifest

    def _found_key(self) -> str | None:
        """Returns the key of what the folder is for; None if that is yet to be decided."""
        if not self.path.exists():
            return None
        is_new = all(
            is_leftover(path, STARTED) or path.name == STARTED for path in self.path.iterdir()
        )
        if not (self.path / STARTED).exists():
            return None if is_new else ""
        if is_json(self.path / STARTED):
            found = json.loads((self.path / STARTED).read_text(encoding="utf-8"))
            return str(found["key"])
        if is_new:
            return None
        raise UserError(
            f"{self.path / STARTED} was not written completely, so what else is in {self.path} "
            "may be of any stage.",
            f"Delete {self.path}, so that the stage is done again; nothing was changed.",
        )

    def journal(self, machine: Machine, *kinds: type[R]) -> Journal[R]:
        """Opens the journal of an unfinished stage.

        Args:
            machine: How the work is done: with parts, if the folder may be lost.
            kinds: The classes of its records; no two have the same fields.
        """
        parts = Parts(machine.parts, self._key) if machine.parts else None
        return Journal(self.path, *kinds, parts=parts)

    def finish(
        self,
        figures: Mapping[str, Any],
        work: Work | None = None,
        *,
        gpus: int = 0,
        elsewhere: bool = False,
    ) -> dict[str, Any]:
        """Writes the manifest, last of all, and deletes the journal and the checkpoints.

        Args:
            figures: What the stage measured of its work.
            work: What was computed on its model.
            gpus: How many GPUs the stage had to itself, those of its workers included.
            elsewhere: Whether workers, or processes of vLLM, used the GPU instead of this one.

        Returns:
            The figures, as JSON keeps them.
        """
        outputs = {
            str(path.relative_to(self.path)): hash_file(path)
            for path in sorted(self.path.rglob("*"))
            if path.is_file()
            and path.name not in (MANIFEST, STARTED)
            and not is_private(path.relative_to(self.path))
            and path.relative_to(self.path).parts[0] != CHECKPOINTS
        }
        # The manifest must not survive a power cut that its files do not.
        for name in outputs:
            sync(self.path / name)
        for folder in {(self.path / name).parent for name in outputs}:
            sync(folder)
        self.manifest = Manifest(
            stage=self.stage,
            key=self._key,
            config=self._config,
            inputs=self._inputs,
            outputs=outputs,
            figures=json.loads(json.dumps(figures)),
            versions=_versions(),
            seconds=(seconds := round(time.monotonic() - self._began, 3)),
            gpu_seconds=round(gpus * seconds, 3),
            peak_memory_mb=_peak_memory_mb(),
            peak_gpu_memory_mb=None if elsewhere else _peak_gpu_memory_mb(),
            work=dataclasses.asdict(work) if work else None,
        )
        write_json(self.path / MANIFEST, self.manifest.model_dump(mode="json"))
        # Not before: until then they are all that the stage resumes from.
        self._remove_what_was_for_resuming()
        return self.manifest.figures

    def _remove_what_was_for_resuming(self) -> None:
        (self.path / JOURNAL).unlink(missing_ok=True)
        storage.remove(str(self.path / CHECKPOINTS))


def _identified(stage: Stage, inputs: Mapping[str, Path | Sequence[Path] | None]) -> dict[str, str]:
    """Identifies the inputs by name; several of one name are numbered."""
    kinds = {each.name: each.kind for each in stage.inputs}
    if unknown := inputs.keys() - kinds:
        raise ValueError(f"The stage {stage.name} declares no inputs {sorted(unknown)}.")
    found = {}
    for name, value in inputs.items():
        if isinstance(value, Path):
            is_policy = kinds[name] == "policy"
            found[name] = identify.policy_at(value) if is_policy else identify.content(name, value)
        else:
            for number, path in enumerate(value or ()):
                found[f"{name}_{number}"] = identify.content(name, path)
    return found


def _reset_peak_memory() -> None:
    if threading.current_thread() is not threading.main_thread():
        # An evaluation beside a training: the peak is the training's.
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if gpu := _gpu():
        gpu.reset_peak_memory_stats()


def _peak_memory_mb() -> float:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        (peak,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 1024
    except (OSError, ValueError):
        peak_ever = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak_ever / (2**20 if sys.platform == "darwin" else 1024)


def _peak_gpu_memory_mb() -> float | None:
    gpu = _gpu()
    return gpu.max_memory_reserved() / 2**20 if gpu else None


def _gpu() -> Any:
    """torch.cuda if this process uses a GPU; torch is not imported for it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_initialized() else None


def _versions() -> dict[str, str]:
    versions = {"srccore": srccore.__version__, "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
