"""The choice of an engine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from srccore.config import EngineConfig, load_config
from srccore.errors import UserError
from srccore.models.engines import rating_engine, sampling_engine


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_an_engine_that_is_not_installed_is_refused_with_how_to_get_it(tmp_path: Path) -> None:
    from local.shrunken import Recorder

    from srccore.run.loop import run

    vllm = EngineConfig(name="vllm")
    for load in (
        lambda: sampling_engine(tmp_path, "cpu", vllm),
        lambda: rating_engine(tmp_path, "cpu", 1, vllm),
        # Before any work is done.
        lambda: run(load_config("tiny", ["engine.name=vllm"]), tmp_path / "run", Recorder()),
    ):
        with pytest.raises(UserError, match="vLLM is not installed") as caught:
            load()
        assert "make vllm-env" in str(caught.value)
    assert not (tmp_path / "run").exists()
