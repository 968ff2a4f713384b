"""Tests of the engine on vLLM, in the environment of ``make vllm-env``; elsewhere, none."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
import tiny_models

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

# In this process: another one would import everything again.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

# Heads of 32 values: vLLM's attention on a CPU knows no smaller ones.
tiny_models.WIDTH = 64
tiny_models.TEXT_SHAPE |= {"hidden_size": 64, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go: a test can see that none are left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder
