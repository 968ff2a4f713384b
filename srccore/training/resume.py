"""Checkpoints, from the newest of which an interrupted training resumes.

A checkpoint contains the trained weights (safetensors), the states of optimiser and schedule
(loaded without unpickling anything but tensors), and the trainer's log. It needs no state of a
random number generator: the order of the samples is known before training
(`srccore.training.trainer.sample_order`), and every optimiser step seeds dropout from its number.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from srccore import storage
from srccore.errors import UserError
from srccore.files import MANIFEST, is_json, sync, write_json
from srccore.hashing import hash_file, stable_hash
from srccore.method.engine import Work
from srccore.training.ranks import Processes

__all__ = [
    "CHECKPOINTS",
    "Checkpoints",
    "PublishedCheckpoints",
    "Timetable",
    "discard",
    "resumable",
    "step_callback",
]

CHECKPOINTS = "checkpoint"
"""The folder for checkpoints in a stage's folder."""
WEIGHTS = "weights.safetensors"
MEMORY = "memory.safetensors"
STATE = "trainer_state.json"
LEAST = 10
"""Checkpoints of a training at least, if it has as many steps and saving is cheap."""
SHARE = 10
"""Training takes at least this many times as long as saving."""
_FILE = re.compile(r"step-(\d+)/(.+)")


class Checkpoints:
    """Checkpoints in a folder; only the newest is kept.

    A checkpoint is complete if it has a manifest, which is written last, and whole if its files
    have the SHA-256 in it.
    """

    def __init__(self, folder: Path) -> None:
        """Does not access the folder yet.

        Args:
            folder: Has one folder per checkpoint; created with the first.
        """
        self.folder = folder

    def newest(self) -> int | None:
        """Returns the optimiser steps done at the newest whole checkpoint.

        Damaged ones are named on stderr.
        """
        for step in sorted(self._complete(), reverse=True):
            if self._is_whole(step):
                return step
            print(
                f"Ignoring the checkpoint of step {step} in {self.folder}: it is damaged.",
                file=sys.stderr,
            )
        return None

    def _complete(self) -> set[int]:
        files = (path.relative_to(self.folder).as_posix() for path in self.folder.glob("*/*"))
        return _steps(files, MANIFEST)

    def _is_whole(self, step: int) -> bool:
        folder = self.folder / f"step-{step}"
        if not is_json(folder / MANIFEST):
            return False
        outputs = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("outputs", {})
        return all(
            (folder / name).is_file() and hash_file(folder / name) == sha256
            for name, sha256 in outputs.items()
        )

    def bring(self, step: int) -> Path:
        """Returns the folder of a complete checkpoint on this machine.

        Raises:
            UserError: It is on another machine.
        """
        found = self.folder / f"step-{step}"
        if not found.is_dir():
            raise UserError(
                f"This process cannot see the checkpoint {found}.",
                "Use an artifact root that all pods can see: s3://BUCKET/PATH.",
            )
        return found

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Writes a checkpoint and removes the previous ones.

        Args:
            step: Optimiser steps done.
            write: Writes the checkpoint's files into a folder.
        """
        made, unfinished = self.folder / f"step-{step}", self.folder / "unfinished"
        storage.remove(str(unfinished))
        unfinished.mkdir(parents=True)
        write(unfinished)
        files = [path for path in sorted(unfinished.rglob("*")) if path.is_file()]
        for path in files:
            sync(path)
        outputs = {path.relative_to(unfinished).as_posix(): hash_file(path) for path in files}
        write_json(unfinished / MANIFEST, {"step": step, "outputs": outputs})
        storage.remove(str(made))
        unfinished.rename(made)
        # The previous one must not be removed while a power cut could still undo that.
        sync(self.folder)
        for other in self.folder.iterdir():
            if other != made:
                storage.remove(str(other))


class PublishedCheckpoints(Checkpoints):
    """Checkpoints that are also stored in a bucket, for machines that do not share a disk.

    The bucket decides which is the newest, so that all processes resume from the same one.
    """

    def __init__(self, folder: Path, uri: str) -> None:
        """Does not access the bucket yet.

        Args:
            folder: Where they are written: the `storage.local_path` of the URI.
            uri: The folder in the bucket.
        """
        super().__init__(folder)
        self.uri = uri

    def _complete(self) -> set[int]:
        if not storage.exists(self.uri):
            return set()
        return _steps((file.path for file in storage.listing(self.uri)), MANIFEST)

    def _is_whole(self, step: int) -> bool:
        try:
            self.bring(step)
        except storage.AlteredError:
            return False
        return True

    def bring(self, step: int) -> Path:
        """Fetches a checkpoint."""
        return storage.fetch(storage.join(self.uri, f"step-{step}"))

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Writes a checkpoint, publishes it, and removes older ones."""
        super().save(step, write)
        storage.publish(self.folder / f"step-{step}", storage.join(self.uri, f"step-{step}"))
        # A newer one belongs to another pod that runs the same training: leave it alone.
        for other in _steps(file.path for file in storage.listing(self.uri)):
            if other < step:
                discard(storage.join(self.uri, f"step-{other}"))


def discard(uri: str) -> None:
    """Removes what is no longer needed; if that is not possible, the training does not fail."""
    try:
        storage.remove(uri)
    except Exception as error:  # errors of the store's client, too
        print(f"Could not delete {uri}: {error}", file=sys.stderr)


def _steps(paths: Iterable[str], name: str = "") -> set[int]:
    """Returns the steps of the checkpoints that have any file, or a file of the given name."""
    found = (_FILE.fullmatch(path) for path in paths)
    return {int(each[1]) for each in found if each and name in ("", each[2])}


def resumable(trainer: type[Any]) -> type[Any]:
    """Makes a trainer class that writes and reads these checkpoints.

    Args:
        trainer: One of TRL's trainer classes.

    Returns:
        A subclass; set `checkpoints` and `processes` before training. Tensors on the CPU in
        `memory`, by name, are part of a checkpoint, too. `counted` says what this process has
        computed so far, where that is counted.
    """
    from safetensors.torch import load_file, save_file

    class Resumable(trainer):  # type: ignore[misc]  # transformers is read without types
        checkpoints: Checkpoints
        processes: Processes
        counted: Callable[[], Work] = Work
        memory: Mapping[str, Any] = {}

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            if self.processes.is_first:
                self.checkpoints.save(self.state.global_step, self._write)
            # The collectives of a step would time out during an upload of many gigabytes.
            self.processes.wait()

        def _write(self, folder: Path) -> None:
            weights = {
                name: parameter.detach().cpu().contiguous()
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            }
            save_file(weights, folder / WEIGHTS)
            if self.memory:
                save_file(dict(self.memory), folder / MEMORY)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self.state.save_to_json(str(folder / STATE))

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            weights = load_file(Path(resume_from_checkpoint) / WEIGHTS)
            trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
            if weights.keys() != trained:
                raise ValueError(f"{resume_from_checkpoint} does not have the weights in training")
            self.model.load_state_dict(weights, strict=False)
            if self.memory:
                for name, tensor in load_file(Path(resume_from_checkpoint) / MEMORY).items():
                    self.memory[name].copy_(tensor)

    return Resumable


class Timetable:
    """When to save a checkpoint (reconstruction).

    Every `minutes`, and after each eleventh of the steps, so that a short training has ten, too.
    Those are left out while saving would take more than a tenth of the time: uploading R-Scorer's
    states may take longer than an eleventh of its training.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts the time.

        Args:
            minutes: Longest time between two checkpoints; 0 means none at all.
            clock: Returns the time in seconds.
        """
        self.minutes = minutes
        self._clock = clock
        self._saved = self._asked = clock()
        self._cost = 0.0

    def is_due(self, done: int, total: int) -> bool:
        """Decides whether to save now.

        Always after the last step, so that nothing is trained again if what follows fails.

        Args:
            done: Optimiser steps done.
            total: Optimiser steps of the training.
        """
        self._asked = self._clock()
        if not self.minutes or done >= total:
            return bool(self.minutes)
        since = self._asked - self._saved
        is_part = done % max(1, total // (LEAST + 1)) == 0
        return since >= 60 * self.minutes or (is_part and since >= SHARE * self._cost)

    def saved(self) -> None:
        """Records that what was due has been saved."""
        self._saved = self._clock()
        self._cost = self._saved - self._asked


def step_callback(
    timetable: Timetable, seed: int, processes: Processes, progress: Callable[[int, int], None]
) -> Any:
    """Makes the callback that seeds each optimiser step, requests checkpoints, reports progress.

    Args:
        timetable: When to save; that of the first process decides for all.
        seed: The run's seed.
        processes: The processes that train together; each drops out different units.
        progress: Receives the optimiser steps done, and how many there are.

    Returns:
        A ``TrainerCallback``.
    """
    import torch
    from transformers import TrainerCallback

    class Steps(TrainerCallback):  # type: ignore[misc]  # transformers is read without types
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.manual_seed(stable_hash(f"{seed}/{state.global_step}/{processes.rank}"))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            done = state.global_step
            progress(done, state.max_steps)
            control.should_save = bool(
                processes.from_first(timetable.is_due(done, state.max_steps))
            )

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            timetable.saved()

    return Steps()
