"""The processes that train one model together, with the environment that torchrun gives them.

Every process has the whole model and trains on its share of each batch; figures and weights are
the same as with a single process. Only the first process writes, and the others wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from srccore.config import OptimizerSettings
from srccore.errors import UserError

__all__ = [
    "Processes",
    "environment_of",
    "is_first",
    "is_launched",
    "is_lost_peer",
    "joined",
    "local_share",
    "most_processes",
]

COLLECTIVE = timedelta(minutes=30)
"""Longest wait for another process within a step; all processes are at the same step."""
WAIT = timedelta(hours=12)
"""Longest wait for the first process, which may be fetching or publishing large files."""
STORE = "SRCCORE_STORE"
"""The environment variable with the file through which the processes of one machine meet."""
# How gloo, and autograd on top of it, report a lost peer: in a plain RuntimeError.
_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer")


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


def environment_of(rank: int, count: int, store: Path) -> dict[str, str]:
    """Returns what torchrun would set for a process, if all processes are on this machine.

    They meet through a file and connect over the loopback interface. torchrun's own store listens
    on all addresses of the machine, and does not ask who connects.

    Args:
        rank: The number of the process.
        count: The number of processes.
        store: A file on a local disk that does not exist yet, the same for all.
    """
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        STORE: str(store),
        "GLOO_SOCKET_IFNAME": loopback,
        # Without the equals sign, NCCL would take any interface whose name starts like this.
        "NCCL_SOCKET_IFNAME": f"={loopback}",
    }


def is_launched() -> bool:
    """Whether this process was started to train, by itself or with others."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()


def is_first() -> bool:
    """Whether this process is the one that writes; a process on its own always is."""
    return not is_launched() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Joins the other processes that were started to train with this one; may be nested.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``; chooses between gloo and NCCL.

    Yields:
        All processes; only this one, if it is on its own.
    """
    if _joined or not is_launched():
        yield _joined[-1] if _joined else _ALONE
        return
    import torch
    import torch.distributed as dist

    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    count, file = int(os.environ["WORLD_SIZE"]), os.environ.get(STORE)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        # Without one, torch opens the store that torchrun names in the environment.
        store=dist.FileStore(file, count) if file else None,  # type: ignore[attr-defined]  # public
        rank=int(os.environ["RANK"]),
        world_size=count,
        timeout=COLLECTIVE,
    )
    # gloo even with GPUs: it notices at once when another process is gone.
    group = dist.new_group(backend="gloo", timeout=WAIT)
    _joined.append(Processes(dist.get_rank(), dist.get_world_size(), group))
    try:
        yield _joined[-1]
    finally:
        _joined.clear()
    # Not after a failure: the others may no longer be there to leave the group together.
    dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error means that a connection to another process broke.

    Args:
        error: The exception; its causes are checked, too.
    """
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    found: BaseException | None = error
    while found is not None:
        if isinstance(found, dist.DistError):
            return True
        if isinstance(found, RuntimeError) and any(sign in str(found) for sign in _LOST):
            return True
        found = found.__cause__ or found.__context__
    return False


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
    by_passes, by_samples = _divided(config, count)
    if config.batch_size % by_samples:
        raise UserError(
            f"A batch of {config.batch_size} (batch_size) times {passes} "
            f"(gradient_accumulation_steps) samples cannot be split evenly among {count} "
            "processes.",
            "Train with a number of processes (pods times processes per pod) that divides one "
            "of the two.",
        )
    return config.batch_size // by_samples, passes // by_passes


def most_processes(config: OptimizerSettings, limit: int) -> int:
    """Returns the largest number of processes, up to a limit, that can share a batch evenly.

    Args:
        config: The stage's section of the preset.
        limit: The most processes; 1 at least.
    """
    return next(
        count for count in range(limit, 0, -1) if not config.batch_size % _divided(config, count)[1]
    )


def _divided(config: OptimizerSettings, count: int) -> tuple[int, int]:
    """By what the forward passes of a step are divided, and by what the samples of each."""
    by_passes = math.gcd(config.gradient_accumulation_steps, count)
    return by_passes, count // by_passes
