"""Trains on all GPUs of one machine, with a process for each.

Each process runs the whole stage, as the processes of a training job do: the first works on the
stage's folder, the others in temporary ones with its checkpoints. They are processes of
`srccore.stages.workers` with the environment that torchrun would give them, so they report, fail
and end as workers do. What torchrun adds, finding other machines and replacing lost ones, is of no
use on one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from srccore.config import RunConfig
from srccore.files import MANIFEST
from srccore.stages.table import STAGES
from srccore.stages.workers import run_tasks, threads_of_each, visible_gpus
from srccore.training.machine import Figures, Machine
from srccore.training.ranks import environment_of, is_lost_peer, most_processes
from srccore.training.resume import CHECKPOINTS, Checkpoints

__all__ = ["blaming_others", "train", "training_processes"]

PATIENCE = 60.0
"""Seconds in which a process that was killed has ended; a GPU's driver takes some to clean up."""


def training_processes(stage: str, config: RunConfig, most: int) -> tuple[int, str | None]:
    """Decides how many processes train a stage together.

    Args:
        stage: The name of a stage that trains.
        config: The configuration.
        most: The maximum.

    Returns:
        As many as can share a batch evenly, and a message if these are fewer.
    """
    section = STAGES[stage].sections["config"]
    settings = getattr(config, section)
    count = most_processes(settings, most)
    if count == most:
        return count, None
    passes = settings.gradient_accumulation_steps
    return count, (
        f"{stage} trains with {count} of {most} processes: {section}.batch_size "
        f"({settings.batch_size}) times {section}.gradient_accumulation_steps ({passes}) samples "
        f"cannot be split evenly among {most}."
    )


def train(
    stage: str,
    config: RunConfig,
    requested: int | None,
    *,
    out: Path,
    machine: Machine,
    note: Callable[[str], None],
    **given: Any,
) -> Figures:
    """Runs a stage that trains, unless it is finished.

    Args:
        stage: Its name.
        config: The configuration.
        requested: The maximum number of processes; None is one for each GPU, or one without a GPU.
        out: Its output folder.
        machine: How the work is done.
        note: Receives a message if fewer processes train than there could be.
        given: The other arguments of the stage function.

    Returns:
        The stage's figures.

    Raises:
        UserError: A process raised one, or was killed.
        RuntimeError: A process failed; the message has its traceback.
    """
    gpus = visible_gpus(machine.device)
    processes, fewer = training_processes(stage, config, requested or max(1, len(gpus)))
    is_finished = (out / MANIFEST).exists()
    if fewer and not is_finished:
        note(fewer)
    # A training refuses a process that sees several GPUs and does not know which one is its own.
    if is_finished or (processes == 1 and len(gpus) < 2):
        return STAGES[stage].run(config, out=out, machine=machine, **given)
    checkpoints = machine.checkpoints or Checkpoints(out / CHECKPOINTS)
    own = Machine(machine.device, checkpoints=checkpoints)
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="srccore-") as scratch:
        environments = _environments(processes, gpus, Path(scratch) / "store")
        folders = [out, *(Path(scratch) / str(rank) for rank in range(1, processes))]
        tasks = {
            rank: (functools.partial(_train, stage, config, folder, own, given), environments[rank])
            for rank, folder in enumerate(folders)
        }
        for sent in run_tasks("Training process", tasks, "use smaller batches"):
            if sent.number == 0 and sent.is_result:
                figures = sent.value
            elif sent.number == 0:
                machine.progress(*sent.value)
    return figures


def _environments(count: int, gpus: Sequence[str], store: Path) -> list[dict[str, str]]:
    """What each process sees of the machine: its threads, and all GPUs of the training."""
    shared = {"OMP_NUM_THREADS": str(threads_of_each(count))}
    if gpus:
        shared["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[:count])
    return [shared | environment_of(rank, count, store) for rank in range(count)]


def _train(
    stage: str,
    config: RunConfig,
    out: Path,
    machine: Machine,
    given: Mapping[str, Any],
    send: Callable[[tuple[int, int, int]], None],
) -> Figures:
    """Runs the stage as one of several processes."""

    def progress(done: int, total: int, tokens: int = 0) -> None:
        send((done, total, tokens))

    machine = dataclasses.replace(machine, progress=progress)
    with blaming_others():
        return STAGES[stage].run(config, out=out, machine=machine, **given)


@contextlib.contextmanager
def blaming_others() -> Iterator[None]:
    """Holds back the error that another process is gone: how that one ended is reported instead."""
    try:
        yield
    except Exception as error:
        if is_lost_peer(error):
            # This process is stopped before, unless nothing has happened to the others.
            time.sleep(PATIENCE)
        raise
