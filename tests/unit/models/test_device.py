"""The device of a stage: what its first line says, and what happens if there is no GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from srccore.errors import UserError
from srccore.models import device
from srccore.models.device import minimum_driver, open_device

ROOT = Path(__file__).parents[3]
CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n"
    "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
)
OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  "
    "(dvs-builder@U22-I3-AE18-23-3)  Tue Sep 23 10:11:16 UTC 2025\n"
    "GCC version:  gcc version 13.3.0\n"
)


@pytest.fixture(autouse=True)
def unseen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine without a GPU and a driver, whatever this one has, where nothing was said yet."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(device, "DRIVER_FILE", tmp_path / "version")
    open_device.cache_clear()
    yield
    open_device.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One H100, as torch describes it."""
    (tmp_path / "version").write_text(OPEN)
    found = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=int(79.25 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_is_named_with_its_memory_its_driver_and_torch(
    gpu: None, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert open_device(name) == "cuda"
    assert said(capsys) == [
        "Device: NVIDIA H100 80GB HBM3, 79.2 GiB, driver 580.95.05, torch 2.13.0 (CUDA 13.0)."
    ]


def test_a_driver_that_does_not_say_its_version_does_not_stop_a_stage(
    gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "version").unlink()
    assert open_device("auto") == "cuda"
    assert "driver unknown" in said(capsys)[0]


def test_a_chosen_cpu_is_described_with_its_threads_whether_there_is_a_gpu_or_not(
    gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_device("cpu") == "cpu"
    threads = torch.get_num_threads()
    assert said(capsys) == [
        f"Device: CPU, {threads} thread{'' if threads == 1 else 's'}, torch 2.13.0 (CUDA 13.0)."
    ]


def test_auto_says_that_it_falls_back_to_the_cpu_and_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert open_device("auto") == "cpu"
    (line,) = said(capsys)
    assert line.startswith("Device: CPU, ")
    assert line.endswith(" No GPU: no NVIDIA driver is loaded on this machine.")


def test_the_line_comes_once_however_many_stages_a_process_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(3):
        open_device("cpu")
    assert len(said(capsys)) == 1


def test_of_the_processes_of_a_pod_only_the_first_has_the_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    open_device("cpu")
    assert said(capsys) == []


@pytest.mark.parametrize(
    ("driver", "cuda", "what", "fix"),
    [
        (None, "13.0", "no NVIDIA driver is loaded", "needs NVIDIA driver 580 or later"),
        (CLOSED, "13.0", "driver 535.183.01 is too old for torch's CUDA 13.0", "driver 580"),
        (CLOSED, "12.8", "although the NVIDIA driver 535.183.01 is loaded", "driver 525"),
        (OPEN, "13.0", "although the NVIDIA driver 580.95.05 is loaded", "LD_LIBRARY_PATH"),
        (OPEN, "21.0", "although the NVIDIA driver 580.95.05", "an NVIDIA driver for CUDA 21.0"),
        (OPEN, None, "was built without CUDA", "Install torch for CUDA"),
    ],
)
def test_no_gpu_where_one_was_asked_for_names_the_cause_and_the_driver_that_is_needed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    driver: str | None,
    cuda: str | None,
    what: str,
    fix: str,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if driver:
        (tmp_path / "version").write_text(driver)
    with pytest.raises(UserError) as raised:
        open_device("cuda")
    assert what in raised.value.what
    assert fix in raised.value.fix
    for place in ("nvidia-smi", "nvidia.com/gpu", "device plugin", "device: cpu"):
        assert place in raised.value.fix


def test_the_driver_that_the_locked_torch_needs_is_known_and_documented() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    (runtime,) = set(re.findall(r"^nvidia-cuda-runtime(?:-cu\d+)?==(\d+\.\d+)", lock, re.MULTILINE))
    needed = minimum_driver(runtime)
    assert needed
    assert f"NVIDIA driver {needed} or later" in (ROOT / "docs" / "operate.md").read_text()
