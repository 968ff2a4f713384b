"""How a training pod reads the environment that its operator sets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from srccore.cluster.entry import World
from srccore.errors import UserError


def pytorchjob(index: int, pods: int = 2) -> dict[str, str]:
    """What the Training Operator 1.9 sets for a job of workers with an elastic policy."""
    return {
        "HOSTNAME": f"src-dpo-worker-{index}",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "src-dpo-worker-0:23456",
        "PET_NNODES": f"{pods}:{pods}",
        "PET_NPROC_PER_NODE": "1",
        "PET_MAX_RESTARTS": "3",
    }


def trainjob(index: int, pods: int = 2) -> dict[str, str]:
    """What Trainer 2.1 sets for a job with numNodes."""
    return {
        "HOSTNAME": f"src-dpo-node-0-{index}",
        "PET_NNODES": str(pods),
        "PET_NPROC_PER_NODE": "1",
        "PET_NODE_RANK": str(index),
        "PET_MASTER_ADDR": "src-dpo-node-0-0.src-dpo",
        "PET_MASTER_PORT": "29500",
    }


@pytest.mark.parametrize("told", [pytorchjob, trainjob])
def test_the_first_pod_is_where_the_others_meet_and_has_the_least_address(told: object) -> None:
    assert callable(told)
    worlds = [World.of(12, 1, told(index, 12)) for index in range(12)]
    assert [world.is_host for world in worlds] == [True] + [False] * 11
    assert len({world.endpoint for world in worlds}) == 1
    # The others find it by that name, and torchrun gives ranks in the order of addresses.
    assert worlds[0].address == worlds[0].endpoint.rpartition(":")[0]
    assert min(world.address for world in worlds) == worlds[0].address


@pytest.mark.parametrize("told", [pytorchjob, trainjob])
def test_patience_and_restarts_are_those_of_the_job_whatever_the_operator_says(
    told: Callable[[int], dict[str, str]],
) -> None:
    world = World.of(2, 1, told(0), restarts=30, patience=86400)
    assert world.restarts == 30
    assert "join_timeout=86400" in " ".join(world.torchrun("worker", [], 3))


def test_torchrun_is_told_all_on_its_command_line() -> None:
    command = World.of(2, 1, pytorchjob(1)).torchrun("worker", ["--task", "{}"], 3)
    told = dict(zip(command[3::2], command[4::2], strict=False))
    assert told["--nnodes"] == "2"
    assert told["--rdzv-endpoint"] == "src-dpo-worker-0:23456"
    assert told["--local-addr"] == "src-dpo-worker-1"
    assert told["--rdzv-conf"].startswith("is_host=0,")
    assert told["--max-restarts"] == "3"
    assert command[-6:] == ["-m", "worker", "--world-size", "2", "--task", "{}"]


def test_one_pod_needs_no_operator() -> None:
    world = World.of(1, 2, {"HOSTNAME": "laptop"})
    assert (world.endpoint, world.address, world.is_host) == ("127.0.0.1:0", "127.0.0.1", True)


@pytest.mark.parametrize(
    ("pods", "processes", "environment", "message"),
    [
        # A TrainJob without spec.trainer: each pod would train alone.
        (2, 1, {}, "2 pods .*PET_NNODES is not set"),
        (2, 1, pytorchjob(0) | {"PET_NNODES": "1:2"}, "PET_NNODES is 1:2"),
        (3, 1, pytorchjob(0), "3 pods .* PET_NNODES is 2:2"),
        (1, 1, trainjob(0), "1 pod .* PET_NNODES is 2 "),
        (2, 2, pytorchjob(0), "2 processes in each pod, but PET_NPROC_PER_NODE is 1"),
        (2, 1, {"PET_NNODES": "2"}, "neither PET_RDZV_ENDPOINT nor PET_MASTER_ADDR is set"),
    ],
)
def test_a_world_other_than_the_one_asked_for_is_refused(
    pods: int, processes: int, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        World.of(pods, processes, environment)


@pytest.mark.parametrize("word", ["auto", "cpu", "gpu"])
def test_a_number_of_processes_that_the_operator_leaves_open_is_ours(word: str) -> None:
    assert World.of(2, 4, pytorchjob(0) | {"PET_NPROC_PER_NODE": word}).processes == 4


def ended(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PET_")}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_pod_that_would_train_alone_ends_with_2_and_says_why() -> None:
    done = ended("srccore.cluster.entry", "--pods", "2", "--processes", "1", "--task", "{}")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: Expected 2 pods to train together")


def test_a_process_that_would_train_alone_ends_with_2_and_says_why() -> None:
    arguments = ("--world-size", "2", "--task", "{}")
    done = ended("srccore.cluster.worker", *arguments, WORLD_SIZE="1")
    assert done.returncode == 2
    said = "Error: Expected 2 processes to train together, but WORLD_SIZE is 1."
    assert done.stderr.startswith(said)
