"""A finished run of a shrunken `tiny`, shared by all tests that read one."""

from __future__ import annotations

from pathlib import Path

import pytest
from shrunken import Recorder, shrunken

from srccore.run.loop import run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder. Tests that change it must copy it first."""
    out = tmp_path_factory.mktemp("loop") / "run"
    run(shrunken(), out, Recorder())
    return out
