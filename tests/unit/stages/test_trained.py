"""What a training stage does with the policy that it has just trained."""

from __future__ import annotations

import io
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from PIL import Image

from srccore.config import LoraSettings, ModelConfig, RationaleTuningConfig
from srccore.data import dataset
from srccore.data.records import Category, Sample
from srccore.errors import UserError
from srccore.models.folding import Share
from srccore.models.policy import load_policy, read_policy
from srccore.stages import trained
from srccore.stages.rationales import tune_rationale
from srccore.stages.trained import check_kept
from srccore.training import trainer
from srccore.training.machine import Machine


def data(out: Path) -> Path:
    picture = io.BytesIO()
    Image.new("RGB", (30, 20), "navy").save(picture, "PNG")
    rationale, _, answer = tiny_models.RESPONSE.partition("\nAnswer: ")
    samples = [
        Sample(
            id=f"{number}",
            category=Category.CHART,
            question=tiny_models.QUESTION,
            answer=answer,
            rationale=rationale,
        )
        for number in range(4)
    ]
    dataset.write_data(out, [(sample, picture.getvalue()) for sample in samples])
    return out


def tune(model: ModelConfig, folder: Path, learning_rate: float) -> dict[str, Any]:
    config = RationaleTuningConfig(
        samples=4,
        learning_rate=learning_rate,
        batch_size=2,
        epochs=2,
        warmup_ratio=0,
        min_format_rate=0,
        lora=LoraSettings(rank=8, alpha=16),
    )
    return tune_rationale(
        config,
        model=model,
        data=data(folder / "data.parquet"),
        out=folder / "tuned",
        seed=0,
        machine=Machine(device="cpu"),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    checkpoint = tiny_models.checkpoint("llava-1.5", tmp_path_factory.mktemp("model"))
    return checkpoint.model_copy(update={"dtype": "bfloat16"})


def test_a_training_frees_its_model_and_records_what_is_left_of_its_adapter(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    left: list[Any] = []

    def load_to_train(*arguments: Any) -> Any:
        loaded = load_policy(*arguments)
        made.append(weakref.ref(loaded.model))
        return loaded

    def load_again(*arguments: Any) -> Any:
        left.extend(each() for each in made)
        return load_policy(*arguments)

    monkeypatch.setattr(trainer, "load_policy", load_to_train)
    monkeypatch.setattr(trained, "load_policy", load_again)
    figures = tune(model, tmp_path, learning_rate=1e-2)
    # Two models of 7B would hardly fit.
    assert left == [None]
    newest = load_policy(read_policy(tmp_path / "tuned")).folding.newest
    assert figures["folding"] == {"projection": newest.projection, "cosine": newest.cosine}
    assert newest.projection == pytest.approx(1, abs=0.05)


def test_a_training_that_the_weights_do_not_show_is_an_error_and_keeps_its_adapter(
    model: ModelConfig, tmp_path: Path
) -> None:
    # Deltas of 1e-13 on weights of 0.02, whose spacing in float32 is 2e-9.
    with pytest.raises(UserError, match=r"keeps -?\d% of the adapter .*optimiser steps") as error:
        tune(model, tmp_path, learning_rate=1e-12)
    assert "rationale.learning_rate" in error.value.fix
    assert (tmp_path / "tuned" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "tuned" / "policy.json").exists()
    assert not (tmp_path / "tuned" / "manifest.json").exists()


def test_little_loss_is_silent_some_is_a_warning_and_most_is_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def check(projection: float) -> str:
        kept = Share(projection=projection, cosine=0.3)
        check_kept(kept, adapter=Path("run/adapter"), dtype="bfloat16", section="dpo")
        return capsys.readouterr().err

    assert check(1.0) == check(0.9) == ""
    warning = check(0.89)
    assert warning.startswith("Folding into bfloat16 weights keeps 89% of the adapter run/adapter.")
    assert "dpo.gradient_accumulation_steps" in warning
    assert "keeps 50%" in check(0.5)
    for lost in (0.49, -0.1, float("nan")):
        with pytest.raises(UserError, match=r"run/adapter: it changes them by too little"):
            check(lost)


def test_no_image_is_decoded_just_to_learn_its_size(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    read = dataset.DataSet.image

    def image(opened: dataset.DataSet, sample_id: str) -> Any:
        decoded.append(sample_id)
        return read(opened, sample_id)

    monkeypatch.setattr(dataset.DataSet, "image", image)
    tune(model, tmp_path, learning_rate=1e-2)
    # Twice for two epochs, once to check the format of the response, and once for TRL's look at
    # the first row of the data set.
    assert sorted(decoded.count(f"{number}") for number in range(4)) == [3, 3, 3, 4]


def test_a_policy_of_the_hub_is_recorded_with_its_commit(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "1" * 40
    cached = tmp_path / "hub" / "models--some--checkpoint"
    shutil.copytree(model.path, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    figures = tune(model.model_copy(update={"path": "some/checkpoint"}), tmp_path, 1e-2)

    assert figures["revision"] == commit
    assert read_policy(tmp_path / "tuned").base.revision == commit
