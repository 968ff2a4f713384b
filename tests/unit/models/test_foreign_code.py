"""Code that comes with a checkpoint never runs, whatever is answered to a question about it."""

from __future__ import annotations

import builtins
import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from srccore.config import ModelConfig, ScorerConfig, TextModelConfig
from srccore.embedded.model import MODELS
from srccore.errors import UserError
from srccore.models.policy import Policy, load_policy
from srccore.models.rating import TransformersRatingEngine
from srccore.training.scorer import RatingExample, train_scorer

CODE = """
from pathlib import Path
Path({mark!r}).touch()
class Evil:
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls()
"""
AUTO_CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "AutoImageProcessor",
    "AutoTokenizer",
)


@pytest.fixture(params=["lvlm", "rating"])
def checkpoint(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["known classes", "unknown classes"])
def hostile(checkpoint: str, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint each of whose files names code to load it with, and perhaps nothing else."""
    folder = tmp_path / checkpoint
    shutil.copytree(MODELS / checkpoint, folder)
    (folder / "evil.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    named: dict[str, Any] = dict.fromkeys(AUTO_CLASSES, "evil.Evil")
    named["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    for file in folder.glob("*.json"):
        content = json.loads(file.read_text())
        if file.name.endswith("config.json") and isinstance(content, dict):
            content["auto_map"] = named
            for part in (content, content.get("image_processor")):
                if isinstance(part, dict):
                    part["auto_map"] = named
                    for name in ("tokenizer_class", "image_processor_type", "processor_class"):
                        if request.param and name in part:
                            part[name] = "Unknown"
            file.write_text(json.dumps(content))
    return folder


def test_code_of_a_checkpoint_never_runs(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "out").mkdir()
    loads: list[Callable[[], object]] = [
        lambda: load_policy(Policy(base=ModelConfig(path=str(hostile)))),
    ]
    if hostile.name == "rating":
        loads = [
            lambda: TransformersRatingEngine.load(hostile, "cpu", 512),
            lambda: train_scorer(
                TextModelConfig(path=str(hostile)),
                [RatingExample("First: a. Second: b.", 3)] * 2,
                ScorerConfig(learning_rate=1e-3, batch_size=2),
                tmp_path / "out",
                seed=0,
            ),
        ]
    for load in loads:
        # What it needs may be missing without its code.
        with contextlib.suppress(UserError):
            load()
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "rating"
    shutil.copytree(MODELS / "rating", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        TransformersRatingEngine.load(folder, "cpu", 512)
