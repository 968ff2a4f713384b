"""Worker processes: real ones, with small jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from srccore.errors import UserError
from srccore.method.engine import Work
from srccore.stages.workers import default_workers, divide, visible_gpus


def squares(batch: int, items: Sequence[int], work: Work) -> Iterator[list[tuple[int, int]]]:
    """Squares numbers, batch by batch, with the process that did it."""
    for start in range(0, len(items), batch):
        yield [(item * item, os.getpid()) for item in items[start : start + batch]]
    work.add(Work(prompts=len(items), forward_passes=-(-len(items) // batch)))


def refuse(_items: Sequence[int], _work: Work) -> Iterator[list[int]]:
    raise UserError("No such model.", "Check the path.")
    yield []


def fail(items: Sequence[int], _work: Work) -> Iterator[list[int]]:
    yield list(items)
    raise ZeroDivisionError("by nothing")


def die(items: Sequence[int], _work: Work) -> Iterator[list[int]]:
    yield list(items)
    os.kill(os.getpid(), signal.SIGKILL)


def see(name: str, _items: Sequence[int], _work: Work) -> Iterator[list[str]]:
    yield [os.environ.get(name, "")]


def linger(folder: Path, _items: Sequence[int], _work: Work) -> Iterator[list[int]]:
    (folder / str(os.getpid())).touch()
    yield []
    time.sleep(600)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_batches_are_the_same_for_any_number_of_workers(count: int) -> None:
    alone, work = Work(), Work()
    items = list(range(11))
    expected = list(divide(partial(squares, 3), items, 3, (), alone))
    found = list(divide(partial(squares, 3), items, 3, range(count), work))
    in_order = sorted([square for square, _ in batch] for batch in found)
    assert in_order == [[square for square, _ in batch] for batch in expected]
    assert work == alone == Work(prompts=11, forward_passes=4)
    processes = {process for batch in found for _, process in batch}
    # There are four batches.
    assert len(processes) == min(count, 4)
    assert os.getpid() not in processes


def test_what_a_worker_refuses_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match=r"No such model\. Check the path\."):
        list(divide(refuse, [1, 2], 1, range(2), Work()))


def test_a_failure_of_a_worker_comes_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Worker \d failed.*ZeroDivisionError: by nothing"):
        list(divide(fail, [1, 2], 1, range(2), Work()))


def test_a_killed_worker_is_reported_and_what_it_sent_is_kept() -> None:
    found = []
    with pytest.raises(UserError, match=r"Worker 0 was killed by SIGKILL.*fewer --workers"):
        for each in divide(die, [1], 1, range(1), Work()):
            found.append(each)
    assert found == [[1]]


def test_each_worker_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-b,6")
    assert visible_gpus() == ["4", "GPU-b", "6"]
    assert default_workers("auto") == 3
    found = divide(partial(see, "CUDA_VISIBLE_DEVICES"), [0, 1], 1, (1, 2), Work())
    assert sorted(each for batch in found for each in batch) == ["6", "GPU-b"]


def test_without_gpus_there_is_a_worker_for_every_two_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for cores, workers in ((1, 1), (2, 1), (16, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert default_workers("auto") == workers


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
    list(divide(partial(linger, Path({folder!r})), [1, 2], 1, range(2), Work()))
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
def test_workers_end_with_the_process_that_started_them(
    tmp_path: Path, signalled: signal.Signals
) -> None:
    script = STARTS.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(workers := [int(path.name) for path in tmp_path.iterdir()]) < 2:
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    if signalled is signal.SIGINT:
        # As a terminal does.
        os.killpg(parent.pid, signal.SIGINT)
    else:
        parent.kill()
    out, _ = parent.communicate(timeout=60)
    assert out == ("interrupted\n" if signalled is signal.SIGINT else "")
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
