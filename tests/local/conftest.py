"""A finished run of a shrunken `tiny`, made once for all tests that look at one."""

from __future__ import annotations

from pathlib import Path

import pytest
from shrunken import Recorder, shrunken

from srccore.run.loop import run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder. Tests copy it before they change it."""
    out = tmp_path_factory.mktemp("loop") / "run"
    run(shrunken(), out, Recorder())
    return out
