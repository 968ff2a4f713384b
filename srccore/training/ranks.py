"""The processes that train one model together, as torchrun starts them.

Every process holds the whole model and trains on its share of each batch; the figures and the
weights are those of one process. The first process alone writes, and the others wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from srccore.config import OptimizerSettings
from srccore.errors import UserError

__all__ = ["Processes", "is_first", "is_launched", "joined", "local_share"]

COLLECTIVE = timedelta(minutes=30)
"""Longest wait for another process within a step; all of them are at the same one."""
WAIT = timedelta(hours=12)
"""Longest wait for the first process, which may fetch or publish large files meanwhile."""


@dataclass(frozen=True)
class Processes:
    """Those that train together, seen from one of them.

    Attributes:
        rank: This one's number; 0 is the first.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1
    _group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Waits until all are here."""
        if self._group is not None:
            import torch.distributed as dist

            dist.barrier(group=self._group)

    def from_first(self, number: int) -> int:
        """Gives all the number that the first process holds."""
        if self._group is None:
            return number
        import torch
        import torch.distributed as dist

        held = torch.tensor([int(number)])
        dist.broadcast(held, src=0, group=self._group)
        return int(held)

    def agree(self, held: Iterable[str], what: str) -> None:
        """Checks that all hold the same.

        Args:
            held: What this process holds.
            what: What that is, for the error.

        Raises:
            RuntimeError: They do not, so they would train on different things.
        """
        if self._group is None:
            return
        import torch
        import torch.distributed as dist

        digest = hashlib.sha256()
        for part in held:
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
    """Whether torchrun started this process, alone or with others."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()


def is_first() -> bool:
    """Whether this process is the one that writes; it is where no launcher speaks."""
    return not is_launched() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Joins the other processes, where torchrun started this one; may be nested.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``: over gloo or over NCCL.

    Yields:
        All of them; this one alone where no launcher speaks.
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
    # Over gloo even beside GPUs: it notices at once when another process is gone.
    group = dist.new_group(backend="gloo", timeout=WAIT)
    _joined.append(Processes(dist.get_rank(), dist.get_world_size(), group))
    try:
        yield _joined[-1]
    finally:
        _joined.clear()
    # Where something failed, the others are not there any more to leave the group with.
    dist.destroy_process_group()


def local_share(config: OptimizerSettings, count: int) -> tuple[int, int]:
    """Divides the batch of an optimiser step, so that it is the same for any number of processes.

    Args:
        config: The stage's section of the preset, whose batch is
            ``batch_size * gradient_accumulation_steps`` samples.
        count: How many processes there are.

    Returns:
        Samples of one forward pass of one process, and its forward passes of one optimiser step.

    Raises:
        UserError: The batch does not divide.
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
