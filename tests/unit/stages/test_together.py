"""Processes that train together on one machine: how many, what they see, and how they fail."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from srccore.config import load_config
from srccore.errors import UserError
from srccore.stages.together import (
    _environments,
    blaming_others,
    training_processes,
)
from srccore.stages.workers import run_tasks
from srccore.training.ranks import joined


def test_processes_that_cannot_share_the_batch_evenly_are_left_out_with_a_message() -> None:
    config = load_config("tiny", ["dpo.gradient_accumulation_steps=3"])
    # 8 samples in 3 passes: 3 processes take a pass each, and 2 samples of it would be 12 of 24.
    assert training_processes("train-dpo", config, 6) == (6, None)
    count, note = training_processes("tune-rationale", config, 6)
    assert (count, note) == (
        4,
        "tune-rationale trains with 4 of 6 processes: rationale.batch_size (8) times "
        "rationale.gradient_accumulation_steps (1) samples cannot be split evenly among 6.",
    )


def test_each_process_sees_the_gpus_of_the_training_and_is_told_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = _environments(2, ["4", "5", "6"], Path("store"))
    assert [(each["RANK"], each["LOCAL_RANK"], each["WORLD_SIZE"]) for each in found] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert {each["CUDA_VISIBLE_DEVICES"] for each in found} == {"4,5"}
    assert {each["OMP_NUM_THREADS"] for each in found} == {"3"}


Do = Callable[[], object]


def meet(do: dict[int, Do], send: Callable[[Any], None]) -> object:
    """Joins the other processes, does what the own rank is to do, and waits for the others."""
    with blaming_others(), joined("cpu") as processes:
        processes.wait()
        result = do.get(processes.rank, int)()
        send(processes.count)
        processes.wait()
    return result


def together(do: dict[int, Do], folder: Path) -> dict[int, object]:
    """The results of two processes."""
    environments = _environments(2, [], folder / "store")
    tasks = {rank: (partial(meet, do), each) for rank, each in enumerate(environments)}
    sent = list(run_tasks("Training process", tasks, "use smaller batches"))
    assert {each.value for each in sent if not each.is_result} == {2}
    return {each.number: each.value for each in sent if each.is_result}


def listening() -> set[str]:
    """The addresses at which this process accepts connections, as the kernel writes them."""
    opened = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    # Columns: local address, state (0A is listening), inode.
    return {
        row[1].partition(":")[0]
        for row in rows
        if row[3] == "0A" and f"socket:[{row[9]}]" in opened
    }


def test_the_processes_only_accept_connections_from_this_machine(tmp_path: Path) -> None:
    found = together({0: listening, 1: listening}, tmp_path)
    # 127.0.0.1
    assert found == {0: {"0100007F"}, 1: {"0100007F"}}


def divide_by_nothing() -> float:
    return 1 / 0


def refuse() -> None:
    raise UserError("No such model.", "Check the path.")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("do", "kind", "message"),
    [
        (divide_by_nothing, RuntimeError, r"(?s)Training process 1 failed.*ZeroDivisionError"),
        (refuse, UserError, r"No such model\. Check the path\."),
        (be_killed, UserError, "Training process 1 was killed by SIGKILL.*use smaller batches"),
    ],
)
def test_the_process_that_failed_is_reported_and_not_the_one_that_waited_for_it(
    do: Do, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        together({1: do}, tmp_path)
