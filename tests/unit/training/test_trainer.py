"""Images that other processes read ahead of the training."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from srccore.config import LoraSettings, ModelConfig, RationaleTuningConfig
from srccore.data.dataset import open_data, write_data
from srccore.data.records import Category, Sample
from srccore.errors import UserError
from srccore.models.device import open_device
from srccore.models.folding import read_adapter
from srccore.models.policy import Policy
from srccore.training.machine import Machine
from srccore.training.rationale import RationaleExample, tune_rationale


def unreadable() -> Any:
    raise UserError("Sample 'x': its image differs from its SHA-256.", "Run prepare-data again.")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_an_error_of_the_user(workers: int, tmp_path: Path) -> None:
    examples = [RationaleExample(tiny_models.QUESTION, tiny_models.RESPONSE, unreadable, (30, 20))]
    lora = LoraSettings(rank=2, alpha=4)
    config = RationaleTuningConfig(
        samples=1, learning_rate=0.01, batch_size=1, image_workers=workers, lora=lora
    )
    policy = Policy(base=ModelConfig(path="embedded:lvlm"))
    with pytest.raises(UserError) as caught:
        tune_rationale(policy, examples, config, tmp_path, seed=0, machine=Machine(device="cpu"))
    assert str(caught.value) == (
        "Sample 'x': its image differs from its SHA-256. Run prepare-data again."
    )


def test_images_may_be_read_by_other_processes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for number in range(8):
        file = io.BytesIO()
        tiny_models.image(30 + number, 20).save(file, "PNG")
        question = {"question": tiny_models.QUESTION, "answer": "3"}
        sample = Sample(id=str(number), category=Category.CHART, **question)
        rows.append((sample, file.getvalue()))
    write_data(tmp_path / "data.parquet", rows)
    opened = open_data(tmp_path / "data.parquet")
    # Read once before, so that whatever a reader keeps open is there in the other processes, too.
    opened.image("0")
    examples = [
        RationaleExample(
            sample.question,
            tiny_models.RESPONSE,
            functools.partial(opened.image, sample.id),
            opened.size(sample.id),
        )
        for sample in opened
    ]
    # Says once what the device is.
    open_device("cpu")
    capfd.readouterr()
    found = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        out.mkdir()
        config = RationaleTuningConfig(
            samples=8,
            learning_rate=0.01,
            batch_size=2,
            image_workers=workers,
            lora=LoraSettings(rank=2, alpha=4),
        )
        policy = Policy(base=ModelConfig(path="embedded:lvlm"))
        tune_rationale(policy, examples, config, out, seed=0, machine=Machine(device="cpu"))
        found.append(read_adapter(out / "adapter").pairs)
    for module, (a, b) in found[0].items():
        assert torch.equal(a, found[1][module][0])
        assert torch.equal(b, found[1][module][1])
    assert capfd.readouterr() == ("", "")
