"""A run that its configuration or its data rule out is refused before it makes anything."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from shrunken import Recorder, shrunken

from srccore.data import dataset
from srccore.data.records import Category, Sample
from srccore.errors import UserError
from srccore.run.loop import run


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A data set from elsewhere: rationales, but no facts."""
    rows = []
    for number in range(12):
        picture = io.BytesIO()
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(picture, "PNG")
        sample = Sample(
            id=f"s{number}",
            category=list(Category)[number % 3],
            question="How many?",
            answer="2",
            rationale="I count two.",
        )
        rows.append((sample, picture.getvalue()))
    dataset.write_data(tmp_path / "foreign.parquet", rows)
    return tmp_path / "foreign.parquet"


def test_the_teacher_facts_is_refused_on_data_without_facts(foreign: Path, tmp_path: Path) -> None:
    observer = Recorder()
    config = shrunken(f"data.source={foreign}")
    with pytest.raises(UserError, match=r"teacher is facts, but no sample of .*foreign"):
        run(config, tmp_path / "run", observer)
    assert not observer.worked
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_is_refused_too_while_a_stage_has_to_ask(
    finished: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(finished, copied)
    config = json.loads((copied / "run.json").read_text())
    config["evaluation"]["judge"] = "endpoint"
    (copied / "run.json").write_text(json.dumps(config))
    observer = Recorder()
    with pytest.raises(UserError, match="evaluate would ask an endpoint"):
        run(shrunken("evaluation.judge=endpoint", "rounds=2"), copied, observer)
    assert not observer.worked


@pytest.mark.parametrize("setting", ["annotation.teacher", "evaluation.judge"])
def test_an_endpoint_without_an_address_is_refused(setting: str, tmp_path: Path) -> None:
    observer = Recorder()
    with pytest.raises(UserError, match=r"would ask an endpoint .* are not set"):
        run(shrunken(f"{setting}=endpoint"), tmp_path / "run", observer)
    assert not observer.worked
    assert not (tmp_path / "run").exists()


def test_a_model_of_an_unsupported_family_is_refused(tmp_path: Path) -> None:
    observer = Recorder()
    (tmp_path / "config.json").write_text('{"model_type": "paligemma"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"family 'paligemma', which is not supported"):
        run(shrunken(f"model.path={tmp_path}"), tmp_path / "run", observer)
    assert not observer.worked
    assert not (tmp_path / "run").exists()
