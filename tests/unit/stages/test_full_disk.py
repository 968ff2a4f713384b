"""A disk that is full: one clear error, nothing half-written believed, and the work resumes.

The limit on a file's size of a process stands for a full disk: the write fails in the same place.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ["data.train=40", "data.calibration=4", "data.heldout=4"]
LIMITED = """
import resource, sys
# Python would write cut bytecode, and every later process would fail to read it.
sys.dont_write_bytecode = True
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
"""
STAGE = LIMITED + "from srccore.cli.main import main; main()"


def stage(name: str, out: Path, *arguments: str, largest: int) -> subprocess.CompletedProcess[str]:
    """Runs a stage in a process whose files may have so many bytes."""
    settings = [part for each in SMALL for part in ("--set", each)]
    command = ["stage", name, *arguments, "--out", str(out), *settings]
    return subprocess.run(
        [sys.executable, "-c", STAGE, str(largest), *command],
        capture_output=True,
        text=True,
        check=False,
    )


def written(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"
    }


def interrupted_and_resumed(tmp_path: Path, name: str, *arguments: str, largest: int) -> None:
    out = tmp_path / "out"
    failed = stage(name, out, *arguments, largest=largest)
    assert failed.returncode == 2, failed.stderr
    assert failed.stderr.startswith("Error: There is no space left to write")
    assert failed.stderr.count("\n") == 1
    assert not (out / "manifest.json").exists()
    assert not list(out.glob("*.tmp"))
    for folder in (out, tmp_path / "undisturbed"):
        assert stage(name, folder, *arguments, largest=2**30).returncode == 0
    assert written(out) == written(tmp_path / "undisturbed")


def test_a_split_that_does_not_fit_is_written_again(tmp_path: Path) -> None:
    interrupted_and_resumed(tmp_path, "prepare-data", largest=10_000)


def test_a_journal_that_does_not_fit_is_continued(tmp_path: Path) -> None:
    assert stage("prepare-data", tmp_path / "data", largest=2**30).returncode == 0
    data = ("--data", str(tmp_path / "data" / "train.parquet"))
    interrupted_and_resumed(tmp_path, "augment-rationales", *data, largest=2_000)


SAVE = (
    LIMITED
    + """
import torch
from safetensors.torch import save_file
from srccore.files import full_disk_explained
with full_disk_explained():
    save_file({"a": torch.zeros(100_000)}, sys.argv[1])
"""
)


def test_weights_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAVE, "1000", str(tmp_path / "weights.safetensors")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "UserError: There is no space left to write a file" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_the_file_is_named_where_the_system_names_it() -> None:
    from srccore.errors import UserError
    from srccore.files import full_disk_explained

    with pytest.raises(UserError, match="No space left on device"), full_disk_explained():
        Path("/dev/full").write_text("x")
    with pytest.raises(FileNotFoundError), full_disk_explained():
        Path("/no/such/folder/file").write_text("x")
