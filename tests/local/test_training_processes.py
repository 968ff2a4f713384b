"""Trainings of a run and of single stages that take several processes of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file
from shrunken import SETTINGS, Recorder, shrunken
from torch.testing import assert_close

from srccore.run.folder import RunFolder
from srccore.run.loop import run
from srccore.stages.manifest import read_manifest

MARK = "SRCCORE_TEST_TRAINING"
# The trainings, each with how far a weight may differ: by half a step of R-Scorer's learning rate,
# since Adam makes steps of that size for the smallest of gradients, and so for what was rounded.
TRAININGS = {"tune-rationale": 1e-5, "train-scorer": 5e-4, "round-1/train-dpo": 1e-5}


def flat(figures: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The numbers of figures, without times, on one level."""
    found = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        elif name != "seconds" and value is not None:
            found[prefix + name] = value
    return found


@pytest.mark.long
def test_a_run_that_trains_with_two_processes_ends_like_one_that_trains_with_one(
    finished: Path, tmp_path: Path
) -> None:
    figures = run(shrunken(), tmp_path / "run", Recorder(), processes=2)
    assert figures == json.loads((finished / "figures.json").read_text())
    for name, atol in TRAININGS.items():
        one, two = (
            flat(read_manifest(root / name).figures) for root in (finished, tmp_path / "run")
        )
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)
        (weights,) = (finished / name).glob("*/*.safetensors")
        found = tmp_path / "run" / weights.relative_to(finished)
        assert_close(load_file(found), load_file(weights), rtol=1e-3, atol=atol)


class Training:
    """Stage 1 by the command line, in a process group of its own, as a terminal starts it."""

    def __init__(self, given: list[str], out: Path, processes: int) -> None:
        self.out, self.before = out, steps(out)
        # A checkpoint after every step.
        settings = (*SETTINGS, "rationale.epochs=5", "rationale.checkpoint_minutes=1e-9")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "srccore", "stage", "tune-rationale", *given),
                *(part for each in settings for part in ("--set", each)),
                *("--out", str(out), "--training-processes", str(processes)),
            ],
            env=os.environ | {MARK: str(out)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def running(self) -> list[int]:
        """All processes that it has started, and itself."""
        mark, found = f"{MARK}={self.out}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
        return sorted(found)

    def ranks(self) -> list[int]:
        """The processes that train."""
        found = [each for each in self.running() if os.getsid(each) == each]
        return [each for each in found if each != self.process.pid]

    def wait_for_progress(self) -> None:
        """Waits for a newer checkpoint than there was when it started."""
        deadline = time.monotonic() + 600
        while steps(self.out) <= self.before:
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self) -> tuple[int, str]:
        """Waits until nothing of it runs; its exit code and what it wrote to stderr."""
        _, said = self.process.communicate(timeout=600)
        deadline = time.monotonic() + 60
        while self.running():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self.process.returncode, said


def steps(out: Path) -> int:
    """The optimiser steps of the newest checkpoint."""
    found = out.glob("checkpoint/step-*/manifest.json")
    return max((int(each.parent.name.removeprefix("step-")) for each in found), default=0)


def names(folder: Path) -> list[Path]:
    """Everything below a folder."""
    return sorted(each.relative_to(folder) for each in folder.rglob("*"))


@pytest.mark.long
def test_whatever_ends_a_training_nothing_of_it_is_left_and_it_resumes(
    finished: Path, tmp_path: Path
) -> None:
    rationales = RunFolder(finished).rationales("train")
    given = ["--data", str(finished / "data" / "train.parquet"), "--rationales", str(rationales)]
    out = tmp_path / "out"

    # One of its processes is killed, as by the kernel when memory runs out.
    training = Training(given, out, 2)
    training.wait_for_progress()
    os.kill(training.ranks()[1], signal.SIGKILL)
    code, said = training.end()
    assert code == 2
    assert said.count("Error: ") == 1
    assert "Error: Training process 1 was killed by SIGKILL. It may have run out of" in said
    assert "Traceback" not in said

    training = Training(given, out, 2)
    training.wait_for_progress()
    training.process.terminate()
    code, said = training.end()
    assert code == 143
    assert said.count("Training resumes from step") == 1

    training = Training(given, out, 2)
    training.wait_for_progress()
    # Ctrl-C, as a terminal sends it.
    os.killpg(training.process.pid, signal.SIGINT)
    code, said = training.end()
    assert code != 0
    assert "Traceback" not in said

    code, said = Training(given, out, 1).end()
    assert code == 0, said
    assert said.count("Training resumes from step") == 1
    code, said = Training(given, tmp_path / "whole", 1).end()
    assert code == 0, said
    assert names(out) == names(tmp_path / "whole")
    one, two = (
        load_file(root / "adapter/adapter_model.safetensors") for root in (tmp_path / "whole", out)
    )
    assert_close(two, one, rtol=1e-3, atol=1e-5)


def test_an_error_of_all_processes_is_reported_once_and_idle_gpus_are_mentioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    row = {"id": "1", "category": "chart", "image": "1.png", "question": "How many?", "answer": "2"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    # There is a process for each GPU that is named, whether it exists or not.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setenv("COLUMNS", "300")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "srccore", "stage", "tune-rationale", "--set", "device=auto"),
            *("--data", str(tmp_path), "--out", str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    device, fewer, error = done.stderr.splitlines()
    assert device.startswith("Device: ")
    assert fewer.startswith("tune-rationale trains with 2 of 3 processes: rationale.batch_size (8)")
    assert error.startswith(f"Error: No sample of {tmp_path} has a rationale.")
