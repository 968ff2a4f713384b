"""What the processes of a training read of each other."""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from srccore.cluster.rendezvous import loads


class _Touch:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._path}",)


def test_the_state_of_a_rendezvous_is_read_as_it_was_written() -> None:
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    state, node = (
        dynamic_rendezvous._RendezvousState(),
        dynamic_rendezvous._NodeDesc("pod-0", 7, 1),
    )
    state.participants[node] = 0
    state.wait_list.add(node)
    state.deadline = state.last_heartbeats[node] = datetime.now(UTC)
    assert vars(loads(pickle.dumps(state))) == vars(state)


def test_nothing_else_is_read(tmp_path: Path) -> None:
    for foreign in (_Touch(tmp_path / "ran"), Path("x"), print):
        with pytest.raises(pickle.UnpicklingError, match="an unexpected object"):
            loads(pickle.dumps(foreign))
    assert not (tmp_path / "ran").exists()


def test_a_pod_that_meets_code_in_the_store_does_not_run_it(tmp_path: Path) -> None:
    from torch.distributed import TCPStore

    # As somebody else on the network of the pods.
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
    )
    payload = base64.b64encode(pickle.dumps(_Touch(tmp_path / "ran")))
    store.set("torch.rendezvous.training", payload.decode())
    done = subprocess.run(
        [
            *(sys.executable, "-m", "srccore.cluster.rendezvous"),
            *("--nnodes", "1", "--nproc-per-node", "1", "--rdzv-backend", "c10d"),
            *("--rdzv-endpoint", f"127.0.0.1:{store.port}", "--rdzv-id", "training"),
            *("--rdzv-conf", "is_host=0", "-m", "this"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert not (tmp_path / "ran").exists()
    assert done.returncode != 0
    assert "state is corrupt" in done.stderr
    assert "Beautiful" not in done.stdout
