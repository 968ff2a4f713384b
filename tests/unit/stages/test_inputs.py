"""What identifies the inputs of a stage."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from srccore import hashing
from srccore.config import DataConfig, ModelConfig
from srccore.errors import UserError
from srccore.hashing import hash_file
from srccore.models.policy import Policy, write_policy
from srccore.stages import inputs as identify
from srccore.stages.data import prepare_data
from srccore.stages.folder import StageFolder
from srccore.stages.manifest import read_manifest
from srccore.stages.table import Stage


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that looks like a checkpoint; its weights are never loaded here."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"a" * 8)
    return folder


def test_new_weights_of_the_same_size_at_the_same_path_are_another_checkpoint(
    checkpoint: Path,
) -> None:
    before = identify.checkpoint(str(checkpoint))
    (checkpoint / "model.safetensors").write_bytes(b"b" * 8)
    assert identify.checkpoint(str(checkpoint)) != before


def test_new_weights_of_a_base_make_another_policy(checkpoint: Path, tmp_path: Path) -> None:
    policy = Policy(base=ModelConfig(path=str(checkpoint)))
    write_policy(tmp_path / "policy.json", policy)
    before = identify.policy(policy), identify.policy_at(tmp_path / "policy.json")
    (checkpoint / "model.safetensors").write_bytes(b"b" * 8)
    after = identify.policy(policy), identify.policy_at(tmp_path / "policy.json")
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_a_checkpoint_is_the_same_whatever_its_card_says(checkpoint: Path) -> None:
    before = identify.checkpoint(str(checkpoint))
    (checkpoint / "README.md").write_text("A card.", encoding="utf-8")
    assert identify.checkpoint(str(checkpoint)) == before


def test_a_copy_elsewhere_is_the_same_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    before = identify.checkpoint(str(checkpoint))
    checkpoint.rename(tmp_path / "moved")
    assert identify.checkpoint(str(tmp_path / "moved")) == before


def test_a_name_of_the_model_hub_identifies_itself() -> None:
    assert identify.checkpoint("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"


def test_a_file_is_read_once_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    real = hashing.hashlib.file_digest

    def counted(file: object, name: str) -> object:
        reads.append(name)
        return real(file, name)  # type: ignore[arg-type]

    monkeypatch.setattr(hashing.hashlib, "file_digest", counted)
    path = tmp_path / "weights"
    path.write_bytes(b"a")
    assert hash_file(path) == hash_file(path)
    assert len(reads) == 1
    # Same size and time but a different inode, as after a tool that replaces files.
    status = path.stat()
    new = tmp_path / "new"
    new.write_bytes(b"b")
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.replace(path)
    hash_file(path)
    assert len(reads) == 2


def test_settings_that_name_nothing_identify_nothing_more(checkpoint: Path) -> None:
    assert identify.setting(ModelConfig(path=str(checkpoint))) == identify.checkpoint(
        str(checkpoint)
    )
    assert identify.setting(DataConfig()) == "embedded"
    assert identify.setting(3) is None


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Input data does not exist: .*none"):
        identify.content("data", tmp_path / "none")


def test_new_images_at_the_same_paths_are_another_data_set(tmp_path: Path) -> None:
    row = {"id": "1", "category": "chart", "question": "?", "answer": "2", "image": "1.png"}
    source = tmp_path / "samples.jsonl"
    source.write_text(json.dumps(row) + "\n", encoding="utf-8")
    found = set()
    for colour in ("red", "blue"):
        Image.new("RGB", (4, 4), colour).save(tmp_path / "1.png")
        found.add(identify.data_source(DataConfig(source=str(source))))
    assert len(found) == 2


def test_what_a_stage_wrote_is_refused_once_it_has_changed(checkpoint: Path) -> None:
    stage = checkpoint.parent
    folder = StageFolder(Stage("stage", "A stage.", "models"), stage / "out")
    checkpoint.rename(stage / "out" / "model")
    (stage / "out" / "figures.json").write_text("{}", encoding="utf-8")
    folder.finish({})
    before = identify.checkpoint(str(stage / "out" / "model"))
    weights = stage / "out" / "model" / "model.safetensors"
    weights.write_bytes(b"b" * weights.stat().st_size)
    for changed in (stage / "out", stage / "out" / "model", weights):
        with pytest.raises(UserError, match=r"model\.safetensors is missing or has changed since"):
            identify.content("model", changed)
    # The rest is as it was, and so is a copy.
    identify.content("figures", stage / "out" / "figures.json")
    copy = shutil.copytree(stage / "out" / "model", stage / "mine")
    assert identify.checkpoint(str(copy)) != before
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing or has changed since"):
        identify.content("model", stage / "out")


def test_a_file_that_was_put_into_a_stages_folder_is_identified_by_its_content(
    tmp_path: Path,
) -> None:
    StageFolder(Stage("stage", "A stage.", "light"), tmp_path / "out").finish({})
    mine = tmp_path / "out" / "mine.jsonl"
    mine.write_bytes(b"a")
    assert identify.content("data", mine) == hash_file(mine)


def test_a_split_with_an_index_is_identified_by_that(tmp_path: Path) -> None:
    prepare_data(DataConfig(train=4, calibration=4, heldout=4), tmp_path)
    known = read_manifest(tmp_path).outputs["train.index.jsonl"]
    assert identify.content("data", tmp_path / "train.parquet") == known
    (tmp_path / "train.parquet").unlink()
    assert identify.content("data", tmp_path / "train.parquet") == known


def test_a_data_set_without_rows_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "samples.jsonl"
    source.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="has no rows"):
        identify.source_samples(DataConfig(source=str(source)))
