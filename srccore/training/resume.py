"""What an interrupted training goes on from: the newest whole state that it wrote.

A checkpoint holds the weights that are trained (safetensors), the states of optimiser and
schedule (read without unpickling anything but tensors), and the trainer's log. It needs no state
of a random number generator: the order of the samples is known before training
(`srccore.training.trainer.sample_order`), and every optimiser step seeds dropout from its number.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from srccore import storage
from srccore.errors import UserError
from srccore.files import MANIFEST, write_json
from srccore.hashing import stable_hash
from srccore.training.ranks import Processes

__all__ = [
    "CHECKPOINTS",
    "Checkpoints",
    "PublishedCheckpoints",
    "discard",
    "resumable",
    "step_callback",
]

CHECKPOINTS = "checkpoint"
"""The folder for them, below a stage's."""
WEIGHTS = "weights.safetensors"
STATE = "trainer_state.json"
_FILE = re.compile(r"step-(\d+)/(.+)")


class Checkpoints:
    """Checkpoints below a folder; the newest alone is kept.

    One is whole where its manifest is, which is written last.
    """

    def __init__(self, folder: Path) -> None:
        """Looks at nothing yet.

        Args:
            folder: Holds one folder for each checkpoint; made when there is one.
        """
        self.folder = folder

    def newest(self) -> int | None:
        """The optimiser steps done at the newest whole checkpoint."""
        files = (path.relative_to(self.folder).as_posix() for path in self.folder.glob("*/*"))
        return max(_steps(files, MANIFEST), default=None)

    def bring(self, step: int) -> Path:
        """The folder of a whole checkpoint, on this machine.

        Raises:
            UserError: It is on another one.
        """
        found = self.folder / f"step-{step}"
        if not found.is_dir():
            raise UserError(
                f"This process cannot see the checkpoint {found}.",
                "Use an artifact root that all pods can see: s3://BUCKET/PATH.",
            )
        return found

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Makes a checkpoint, and removes the ones before.

        Args:
            step: Optimiser steps done.
            write: Writes its files into a folder.
        """
        made, unfinished = self.folder / f"step-{step}", self.folder / "unfinished"
        storage.remove(str(unfinished))
        unfinished.mkdir(parents=True)
        write(unfinished)
        write_json(unfinished / MANIFEST, {"step": step})
        storage.remove(str(made))
        unfinished.rename(made)
        for other in self.folder.iterdir():
            if other != made:
                storage.remove(str(other))

    def remove(self) -> None:
        """Removes all of them from this machine."""
        storage.remove(str(self.folder))


class PublishedCheckpoints(Checkpoints):
    """Checkpoints that a bucket holds too, for a machine that does not share this one's disk.

    The bucket decides which is the newest, so that all processes go on from the same one.
    """

    def __init__(self, folder: Path, uri: str) -> None:
        """Asks for nothing yet.

        Args:
            folder: Where they are written; it is `storage.local_path` of the URI.
            uri: The folder in the bucket.
        """
        super().__init__(folder)
        self.uri = uri

    def newest(self) -> int | None:
        """The optimiser steps done at the newest whole checkpoint in the bucket."""
        if not storage.exists(self.uri):
            return None
        files = (file.path for file in storage.listing(self.uri))
        return max(_steps(files, MANIFEST), default=None)

    def bring(self, step: int) -> Path:
        """Fetches a checkpoint."""
        return storage.fetch(storage.join(self.uri, f"step-{step}"))

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Makes a checkpoint, publishes it, and removes older ones."""
        super().save(step, write)
        storage.publish(self.folder / f"step-{step}", storage.join(self.uri, f"step-{step}"))
        # A newer one is of another pod that trains the same at the same time: let it alone.
        for other in _steps(file.path for file in storage.listing(self.uri)):
            if other < step:
                discard(storage.join(self.uri, f"step-{other}"))


def discard(uri: str) -> None:
    """Removes what is needed no longer; where that may not be, no training fails for it."""
    try:
        storage.remove(uri)
    except Exception as error:  # of the store's client, too
        print(f"Could not delete {uri}: {error}", file=sys.stderr)


def _steps(paths: Iterable[str], name: str = "") -> set[int]:
    """Steps of the checkpoints of which a file is there, or a file of that name."""
    found = (_FILE.fullmatch(path) for path in paths)
    return {int(each[1]) for each in found if each and name in ("", each[2])}


def resumable(trainer: type[Any]) -> type[Any]:
    """Makes a class of trainers that write and read these checkpoints.

    Args:
        trainer: A trainer's class of TRL.

    Returns:
        A subclass; `checkpoints` and `processes` are set before it trains.
    """
    from safetensors.torch import load_file, save_file

    class Resumable(trainer):  # type: ignore[misc]  # transformers is read without types
        checkpoints: Checkpoints
        processes: Processes

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            if self.processes.is_first:
                self.checkpoints.save(self.state.global_step, self._write)
            # A step's collectives wait less long than an upload of gigabytes may take.
            self.processes.wait()

        def _write(self, folder: Path) -> None:
            weights = {
                name: parameter.detach().cpu().contiguous()
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            }
            save_file(weights, folder / WEIGHTS)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self.state.save_to_json(str(folder / STATE))

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            weights = load_file(Path(resume_from_checkpoint) / WEIGHTS)
            trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
            if weights.keys() != trained:
                raise ValueError(f"{resume_from_checkpoint} does not have the weights in training")
            self.model.load_state_dict(weights, strict=False)

    return Resumable


def step_callback(every: int, seed: int, processes: Processes) -> Any:
    """Makes the callback that seeds each optimiser step and asks for checkpoints.

    Args:
        every: Optimiser steps between two checkpoints; 0 asks for none.
        seed: The run's seed.
        processes: Those that train together; each drops out other units.

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
            control.should_save = bool(every) and done % every == 0 and done < state.max_steps

    return Steps()
