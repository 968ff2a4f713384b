"""The images, built once with the real command, and a run without containers to compare with.

The images stay in podman's storage: with a warm cache only the layer with the code is built.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from container.podman import Podman, give
from local.shrunken import SETTINGS


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    if os.geteuid() != 0:
        pytest.skip("containers are built and run as root here")
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed (apt-get install podman)")
    return Podman(tmp_path_factory.mktemp("podman"))


@pytest.fixture(scope="session")
def images(podman: Podman) -> Podman:
    """podman, with all images built."""
    podman.build()
    return podman


@pytest.fixture(scope="session")
def run_outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a shrunken `tiny`, without containers."""
    out = tmp_path_factory.mktemp("outside") / "run"
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    subprocess.run(
        [sys.executable, "-m", "srccore", "run", "--preset", "tiny", "--out", out, *settings],
        check=True,
        capture_output=True,
    )
    give(out)
    return out
