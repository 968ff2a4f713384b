"""What SIGTERM does to a process."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from srccore.stopping import deferred, stoppable


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    # The handler runs between two instructions of the main thread.
    signal.sigtimedwait([], 0)


def test_it_ends_through_all_that_is_open(capfd: pytest.CaptureFixture[str]) -> None:
    done = []
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, stoppable():
        try:
            sigterm()
            done.append("what follows")
        finally:
            # A second signal does not interrupt what the first one began.
            sigterm()
            done.append("closed")
    assert stop.value.code == 143
    assert done == ["closed"]
    assert "Stopped by SIGTERM. What is done is kept" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_block_that_defers_it_finishes_and_then_the_process_ends() -> None:
    done = []
    with pytest.raises(SystemExit) as stop, stoppable():
        with deferred(lambda: done.append("winding up")):
            sigterm()
            done.append("finished")
        done.append("what follows")
    assert stop.value.code == 143
    assert done == ["winding up", "finished"]
    with stoppable(), deferred(lambda: done.append("again")):
        pass
    assert len(done) == 2


def test_an_error_in_a_block_that_defers_it_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), stoppable(), deferred(lambda: None):
        sigterm()
        raise ZeroDivisionError


def test_another_thread_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def look() -> None:
        with stoppable(), deferred(lambda: None):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]
