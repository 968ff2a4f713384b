"""Several processes train what one trains: the same losses, the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_trainings
from safetensors.torch import load_file
from torch.testing import assert_close

from srccore.config import DpoConfig
from srccore.errors import UserError
from srccore.training.ranks import joined, local_share

pytestmark = pytest.mark.long

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    small_trainings.main(out)
    return out


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("together")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "small_trainings", str(out)),
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    # Neither process prints anything.
    assert done.stdout == ""
    return out


def outcome(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "outcome.json").read_text())
    training = found.pop("training", found)
    training.pop("seconds")
    training.pop("work")
    return found | training


def work(folder: Path) -> dict[str, int]:
    found = json.loads((folder / "outcome.json").read_text())
    return found.get("training", found)["work"]


@pytest.mark.parametrize("name", small_trainings.TRAININGS)
def test_two_processes_get_the_losses_and_figures_of_one(
    alone: Path, together: Path, name: str
) -> None:
    one = outcome(alone / name)
    assert outcome(together / name) == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert outcome(together / f"{name}-by-1") == outcome(together / name)
    # It learned. A loss that adds up tokens also depends on how long a batch's responses are.
    assert one.get("reward_margin", one["first_loss"] - one["last_loss"]) > 0


@pytest.mark.parametrize("name", ["dpo", "rationale"])
def test_two_processes_together_compute_what_one_does(
    alone: Path, together: Path, name: str
) -> None:
    assert work(together / name) == work(alone / name)
    assert work(together / f"{name}-by-1") == work(alone / name)


@pytest.mark.parametrize("name", small_trainings.TRAININGS)
def test_two_processes_get_the_weights_of_one(alone: Path, together: Path, name: str) -> None:
    (file,) = (alone / name).glob("*/*.safetensors")
    one, two = (load_file(root / name / file.parent.name / file.name) for root in (alone, together))
    assert_close(two, one, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", small_trainings.TRAININGS)
def test_the_first_process_alone_writes(together: Path, name: str) -> None:
    assert [path.name for path in (together / f"{name}-by-1").iterdir()] == ["outcome.json"]


def test_how_a_batch_is_shared_changes_no_loss(alone: Path) -> None:
    assert outcome(alone / "dpo-of-one-pass") == pytest.approx(
        outcome(alone / "dpo"), rel=1e-4, abs=1e-5
    )


@pytest.mark.parametrize(
    ("samples", "passes", "count", "share"),
    [
        (8, 4, 1, (8, 4)),
        (8, 4, 4, (8, 1)),
        (8, 4, 2, (8, 2)),
        (8, 1, 2, (4, 1)),
        # By both: half the passes, and half the samples in each.
        (8, 2, 4, (4, 1)),
        (3, 2, 6, (1, 1)),
    ],
)
def test_a_batch_is_shared_so_that_it_stays_the_same(
    samples: int, passes: int, count: int, share: tuple[int, int]
) -> None:
    config = small_config(samples, passes)
    assert local_share(config, count) == share
    assert share[0] * share[1] * count == samples * passes


def small_config(samples: int, passes: int) -> DpoConfig:
    return DpoConfig(
        learning_rate=1,
        batch_size=samples,
        gradient_accumulation_steps=passes,
        lora=small_trainings.LORA,
    )


def test_a_batch_that_cannot_be_shared_is_told_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"8 \(batch_size\) times 2 \(.*steps\) .* 3 processes"):
        local_share(small_config(8, 2), 3)


def test_a_process_that_nobody_launched_is_alone_and_waits_for_nobody() -> None:
    with joined("cpu") as processes:
        processes.wait()
        assert (processes.count, processes.is_first) == (1, True)
        assert processes.from_first(7) == 7
        processes.agree(["anything"], "samples")
