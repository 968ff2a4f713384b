"""A resumed training ends with the same weights as an uninterrupted one."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_trainings
import torch
from safetensors.torch import load_file

from srccore.config import LoraSettings
from srccore.files import MANIFEST
from srccore.hashing import hash_file

pytestmark = pytest.mark.long

EVERY_STEP = {"checkpoint_minutes": 1e-9}

# Dropout draws random numbers in every step; 6 samples in batches of 4 are 2 steps per epoch.
TRAININGS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "dpo": (small_trainings.dpo, {"lora": LoraSettings(rank=2, alpha=4, dropout=0.5)}),
    "rationale": (small_trainings.rationale, {"lora": LoraSettings(rank=2, alpha=4, dropout=0.5)}),
    "scorer": (small_trainings.scorer, {}),
    "scorer-of-lora": (small_trainings.scorer, {"lora": small_trainings.LORA}),
}


class Cut:
    """Interrupts a training after a step, and records the steps."""

    def __init__(self, after: int | None = None) -> None:
        self.after = after
        self.steps: list[int] = []

    def __call__(self, done: int, total: int, tokens: int = 0) -> None:
        self.steps.append(done)
        if done == self.after:
            raise KeyboardInterrupt


def made(outcome: Any, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The figures without those of the last attempt, and the weights."""
    figures = dataclasses.asdict(outcome)
    for name in ("seconds", "work"):
        figures.get("training", figures).pop(name)
    (file,) = folder.glob("*/*.safetensors")
    return figures, load_file(file)


def folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("name", TRAININGS)
def test_it_goes_on_from_its_newest_checkpoint_to_the_same_weights(
    tmp_path: Path, name: str
) -> None:
    train, changes = TRAININGS[name]
    whole = folder(tmp_path / "whole")
    figures, weights = made(train(whole, **EVERY_STEP, **changes), whole)

    cut, out = Cut(after=5), folder(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        train(out, **EVERY_STEP, progress=cut, **changes)
    assert [path.name for path in out.iterdir()] == ["checkpoint"]
    assert [path.name for path in (out / "checkpoint").iterdir()] == ["step-4"]

    again = Cut()
    found, other = made(train(out, **EVERY_STEP, progress=again, **changes), out)
    assert again.steps == [5, 6]
    assert found == figures
    assert other.keys() == weights.keys()
    assert all(torch.equal(other[each], weights[each]) for each in weights)
    # A training that has finished is not done again if what follows it fails.
    again = Cut()
    found, other = made(train(out, **EVERY_STEP, progress=again, **changes), out)
    assert again.steps == []
    assert found == figures
    assert all(torch.equal(other[each], weights[each]) for each in weights)


def interrupted(out: Path, **changes: Any) -> Path:
    with pytest.raises(KeyboardInterrupt):
        small_trainings.dpo(out, progress=Cut(after=5), **changes)
    return out / "checkpoint" / "step-4"


def test_a_checkpoint_holds_no_more_than_is_needed(tmp_path: Path) -> None:
    checkpoint = interrupted(tmp_path, **EVERY_STEP)
    names = {"optimizer.pt", "scheduler.pt", "trainer_state.json", MANIFEST}
    names |= {"weights.safetensors", "memory.safetensors"}
    assert {path.name for path in checkpoint.iterdir()} == names
    # Only those of the adapter: the base model's weights are not copied.
    weights = load_file(checkpoint / "weights.safetensors")
    assert all("lora_" in name for name in weights)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert manifest["step"] == 4
    assert manifest["outputs"].keys() == names - {MANIFEST}


def test_none_is_written_where_none_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        small_trainings.dpo(tmp_path, progress=Cut(after=5), checkpoint_minutes=0)
    assert list(tmp_path.iterdir()) == []


class Harm:
    """Code that a pickle could run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, name: str) -> None:
    checkpoint = interrupted(tmp_path, **EVERY_STEP)
    torch.save(Harm(tmp_path / "harm"), checkpoint / name)
    # Anyone who can write the file can also write its hash.
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["outputs"][name] = hash_file(checkpoint / name)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(pickle.UnpicklingError):
        small_trainings.dpo(tmp_path, **EVERY_STEP)
    assert not (tmp_path / "harm").exists()


def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path, **EVERY_STEP)
    other = LoraSettings(rank=2, alpha=4, target_modules=r".*language_model.*\.q_proj")
    with pytest.raises(ValueError, match="does not have the weights"):
        small_trainings.dpo(tmp_path, **EVERY_STEP, lora=other)
