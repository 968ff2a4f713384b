"""Worker processes: real ones, with small jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path

import pytest

from srccore.config import EngineConfig
from srccore.errors import UserError
from srccore.method.engine import Work
from srccore.stages import workers
from srccore.stages.workers import (
    _environment,
    default_workers,
    divide,
    gpus_of,
    visible_gpus,
)
from srccore.training.machine import Machine

Batches = Sequence[Sequence[int]]


def squares(batches: Batches, work: Work) -> Iterator[list[tuple[int, int]]]:
    """Squares numbers, batch by batch, with the process that did it."""
    for batch in batches:
        work.add(Work(prompts=len(batch), forward_passes=1))
        yield [(item * item, os.getpid()) for item in batch]


def refuse(_batches: Batches, _work: Work) -> Iterator[list[int]]:
    raise UserError("No such model.", "Check the path.")
    yield []


def fail(batches: Batches, _work: Work) -> Iterator[list[int]]:
    yield list(batches[0])
    raise ZeroDivisionError("by nothing")


def die(batches: Batches, _work: Work) -> Iterator[list[int]]:
    yield list(batches[0])
    os.kill(os.getpid(), signal.SIGKILL)


def see(name: str, _batches: Batches, _work: Work) -> Iterator[list[str]]:
    yield [os.environ.get(name, "")]


def linger(folder: Path, _batches: Batches, _work: Work) -> Iterator[list[int]]:
    # What an engine starts: a process that outlives the one that started it, if that is killed.
    started = subprocess.Popen(["sleep", "600"])
    for process in (os.getpid(), started.pid):
        (folder / str(process)).touch()
    yield []
    time.sleep(600)


def leave(folder: Path, _batches: Batches, _work: Work) -> Iterator[list[int]]:
    def end() -> None:
        # As an engine takes some time to end its processes.
        time.sleep(0.5)
        (folder / "left").touch()

    Finalize(None, end, exitpriority=0)
    yield []


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_batches_are_the_same_for_any_number_of_workers(count: int) -> None:
    alone, work = Work(), Work()
    batches = [range(3), range(3, 6), range(6, 9), range(9, 11)]
    expected = list(divide(squares, batches, (), alone))
    found = list(divide(squares, batches, range(count), work))
    in_order = sorted([square for square, _ in batch] for batch in found)
    assert in_order == [[square for square, _ in batch] for batch in expected]
    assert work == alone == Work(prompts=11, forward_passes=4)
    processes = {process for batch in found for _, process in batch}
    # There are four batches.
    assert len(processes) == min(count, 4)
    assert os.getpid() not in processes


@pytest.mark.parametrize("count", [0, 2])
def test_the_work_of_a_batch_is_known_as_soon_as_the_batch(count: int) -> None:
    work, seen = Work(), []
    for _ in divide(squares, [[0, 1], [2, 3], [4, 5]], range(count), work):
        seen.append(work.prompts)
    assert seen == [2, 4, 6]


def test_what_a_worker_refuses_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match=r"No such model\. Check the path\."):
        list(divide(refuse, [[1], [2]], range(2), Work()))


def test_a_failure_of_a_worker_comes_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Worker \d failed.*ZeroDivisionError: by nothing"):
        list(divide(fail, [[1], [2]], range(2), Work()))


def test_a_killed_worker_is_reported_and_what_it_sent_is_kept() -> None:
    found = []
    with pytest.raises(UserError, match=r"Worker 0 was killed by SIGKILL.*fewer --workers"):
        for each in divide(die, [[1]], range(1), Work()):
            found.append(each)
    assert found == [[1]]


def test_each_worker_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-b,6")
    assert visible_gpus() == ["4", "GPU-b", "6"]
    assert default_workers("auto") == 3
    # As beside a training, which has worker 0's.
    found = divide(partial(see, "CUDA_VISIBLE_DEVICES"), [[0], [1]], (1, 2), Work())
    assert sorted(each for batch in found for each in batch) == ["6", "GPU-b"]


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [
        ("0", 1, ["0"]),
        ("0,1,2,3", 1, ["0,1,2,3"]),
        ("0,1,2,3", 2, ["0,1", "2,3"]),
        # One GPU is left over.
        ("0,1,2", 2, ["0", "1"]),
        ("0,1", 3, ["0", "1", "0"]),
        ("-1", 2, [None, None]),
    ],
)
def test_workers_share_the_gpus(
    visible: str, count: int, expected: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = [_environment(number, count).get("CUDA_VISIBLE_DEVICES") for number in range(count)]
    assert found == expected


@pytest.mark.parametrize(
    ("visible", "workers", "tensor_parallel_size", "expected"),
    [
        ("-1", (), 1, 0),
        ("0,1", (), 1, 1),
        ("0,1,2,3", (), 2, 2),
        ("0,1,2,3", (0, 1), 2, 4),
        # Beside a training, which has worker 0's.
        ("0,1,2,3", (1, 2, 3), 1, 3),
        ("0,1", (0, 1, 2), 1, 2),
    ],
)
def test_the_gpus_of_a_stage_are_those_of_its_engine_or_its_workers(
    visible: str,
    workers: tuple[int, ...],
    tensor_parallel_size: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    engine = EngineConfig(name="vllm", tensor_parallel_size=tensor_parallel_size)
    assert gpus_of(Machine(workers=workers), engine) == expected


def test_workers_that_need_several_gpus_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert [default_workers("cuda", each) for each in (1, 2, 8)] == [5, 2, 1]


@pytest.mark.parametrize("hidden", ["", "-1", "-1,0"])
def test_without_gpus_there_is_a_worker_for_every_two_cores(
    hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    for cores, expected in ((1, 1), (2, 1), (16, 8), (96, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert default_workers("auto") == expected


def test_a_limit_of_the_container_counts_as_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(workers, "_QUOTA", tmp_path / "cpu.max")
    # In a period of 100 ms: no limit, 4 cores, half a core.
    for limit, expected in (("max 100000", 6), ("400000 100000", 2), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
        assert default_workers("cpu") == expected


@pytest.mark.parametrize(("named", "threads"), [("", 3), ("4,1", 4), ("many", 3)])
def test_workers_share_the_cores_with_all_workers_of_the_run(
    named: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", named)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    # Worker 1 of 2, while the process that started it trains.
    found = divide(partial(see, "OMP_NUM_THREADS"), [[0]], (1,), Work())
    assert list(found) == [[str(threads)]]


def test_a_worker_that_has_sent_everything_ends_by_itself(tmp_path: Path) -> None:
    list(divide(partial(leave, tmp_path), [[0], [1]], range(1), Work()))
    assert (tmp_path / "left").exists()


STARTS = """
import signal, sys
# A shell ignores it for what it starts in the background, which this process inherits.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {tests!r})
from functools import partial
from pathlib import Path
from test_workers import linger
from srccore.method.engine import Work
from srccore.stages import workers
from srccore.stages.workers import divide
workers._PRELOADED.clear()
try:
    list(divide(partial(linger, Path({folder!r})), [[1], [2]], range(2), Work()))
except KeyboardInterrupt:
    print("interrupted")
"""


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("signalled", [signal.SIGINT, signal.SIGKILL])
def test_workers_and_what_they_started_end_with_the_process_that_started_them(
    tmp_path: Path, signalled: signal.Signals
) -> None:
    script = STARTS.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(started := [int(path.name) for path in tmp_path.iterdir()]) < 4:
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    if signalled is signal.SIGINT:
        # As a terminal does.
        os.killpg(parent.pid, signal.SIGINT)
    else:
        parent.kill()
    out, _ = parent.communicate(timeout=60)
    assert out == ("interrupted\n" if signalled is signal.SIGINT else "")
    while any(is_running(process) for process in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)
