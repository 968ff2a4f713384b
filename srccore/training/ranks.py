"""The processes that train one model together, as started by torchrun.

Every process has the whole model and trains on its share of each batch; figures and weights are
the same as with a single process. Only the first process writes, and the others wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from srccore.config import OptimizerSettings
from srccore.errors import UserError

__all__ = ["Processes", "is_first", "is_launched", "joined", "local_share"]

COLLECTIVE = timedelta(minutes=30)
"""Longest wait for another process within a step; all processes are at the same step."""
WAIT = timedelta(hours=12)
"""Longest wait for the first process, which may be fetching or publishing large files."""


@dataclass(frozen=True)
class Processes:
    """The processes that train together, as seen from one of them.

    Attributes:
        rank: The number of this process; 0 is the first.
        count: The number of processes.
    """

    rank: int = 0
    count: int = 1
    _group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Waits until all processes have called this."""
        if self._group is not None:
            import torch.distributed as dist

            dist.barrier(group=self._group)

    def from_first(self, number: int) -> int:
        """Returns the number of the first process in all processes."""
        if self._group is None:
            return number
        import torch
        import torch.distributed as dist

        shared = torch.tensor([int(number)])
        dist.broadcast(shared, src=0, group=self._group)
        return int(shared)

    def total(self, numbers: Sequence[int]) -> list[int]:
        """Adds up the numbers of all processes, one by one; all get the result."""
        if self._group is None:
            return list(numbers)
        import torch
        import torch.distributed as dist

        shared = torch.tensor(numbers)
        dist.all_reduce(shared, group=self._group)
        return shared.tolist()

    def agree(self, parts: Iterable[str], what: str) -> None:
        """Checks that all processes have the same texts.

        Args:
            parts: The texts of this process.
            what: What they are, for the error.

        Raises:
            RuntimeError: They differ, so the processes would train on different things.
        """
        if self._group is None:
            return
        import torch
        import torch.distributed as dist

        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.encode())
        own = torch.tensor(list(digest.digest()))
        every = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(every, own, group=self._group)
        others = [rank for rank, each in enumerate(every) if not torch.equal(each, own)]
        if others:
            raise RuntimeError(
                f"Process {self.rank} trains on different {what} from processes {others}."
            )


_ALONE = Processes()
_joined: list[Processes] = []


def is_launched() -> bool:
    """Whether torchrun started this process, by itself or with others."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()


def is_first() -> bool:
    """Whether this process is the one that writes; without torchrun it always is."""
    return not is_launched() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Joins the other processes if torchrun started this one; may be nested.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``; chooses between gloo and NCCL.

    Yields:
        All processes; without torchrun only this one.
    """
    if _joined or not is_launched():
        yield _joined[-1] if _joined else _ALONE
        return
    import torch
    import torch.distributed as dist

    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=COLLECTIVE)
    # gloo even with GPUs: it notices at once when another process is gone.
    group = dist.new_group(backend="gloo", timeout=WAIT)
    _joined.append(Processes(dist.get_rank(), dist.get_world_size(), group))
    try:
        yield _joined[-1]
    finally:
        _joined.clear()
    # Not after a failure: the others may no longer be there to leave the group together.
    dist.destroy_process_group()


def local_share(config: OptimizerSettings, count: int) -> tuple[int, int]:
    """Divides the batch of an optimiser step so that it is the same for any number of processes.

    Args:
        config: The stage's section of the preset, whose batch is
            ``batch_size * gradient_accumulation_steps`` samples.
        count: The number of processes.

    Returns:
        For one process: samples per forward pass, and forward passes per optimiser step.

    Raises:
        UserError: The batch cannot be divided evenly.
    """
    passes = config.gradient_accumulation_steps
    by_passes = math.gcd(passes, count)
    by_samples = count // by_passes
    if config.batch_size % by_samples:
        raise UserError(
            f"A batch of {config.batch_size} (batch_size) times {passes} "
            f"(gradient_accumulation_steps) samples cannot be split evenly among {count} "
            "processes.",
            "Train with a number of processes (pods times processes per pod) that divides one "
            "of the two.",
        )
    return config.batch_size // by_samples, passes // by_passes
