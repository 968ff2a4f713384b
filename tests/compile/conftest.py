"""A backend, and a small compiled pipeline to send to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kfp_server import KfpServer, serving
from shallow import shallow
from small_pipeline import compile_small


@pytest.fixture
def server() -> Iterator[KfpServer]:
    with serving() as it:
        yield it


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shallow(compile_small, tmp_path_factory.mktemp("compiled") / "src-tiny.yaml")
