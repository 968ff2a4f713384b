"""Tasks: what the pods of a job receive about a stage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import s3_server
from s3_server import S3Server

from srccore import storage
from srccore.cluster.task import StageTask, check_checkpoints, read_artifacts
from srccore.containers.names import CACHE
from srccore.errors import UserError
from srccore.stages.table import STAGES
from srccore.steps.step import Reference, finished_stage, locate_stage, run_stage

moto, no_aws = s3_server.moto, s3_server.no_aws

ROOT = "s3://bucket/artifacts"
DATA = {"train": 8.0, "calibration": 8.0, "heldout": 8.0, "seed": 0.0}
TEACHER = {"config": {"teacher": "facts"}}
RATE, LORA = {"learning_rate": 1}, {"lora": {"rank": 2, "alpha": 4}}


@pytest.fixture
def root(no_aws: None, moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    it = moto.with_new_bucket()
    for name, value in it.environment.items():
        monkeypatch.setenv(name, value)
    return f"{it.uri}/artifacts"


def prepared(root: str, artifact: Path) -> str:
    """The path of a reference to a train split."""
    done = run_stage("prepare-data", root, inputs={}, settings={"config": DATA})
    done.refer(str(artifact), "train.parquet")
    return str(artifact)


def reference(path: Path, uri: str) -> str:
    path.write_text(Reference(uri=uri).model_dump_json())
    return str(path)


def policy(path: Path, *adapters: str, base: str = "embedded:lvlm") -> str:
    values = {"base": {"path": base}, "adapters": adapters}
    path.write_text(json.dumps({"record": "policy", "version": 1, "policy": values}))
    return str(path)


def made_of(
    stage: str, root: str, inputs: Mapping[str, Any], settings: Mapping[str, Any], threads: int = 0
) -> StageTask:
    return StageTask(
        stage=stage,
        artifact_root=root,
        inputs=read_artifacts(stage, inputs),
        settings=dict(settings),
        threads=threads,
    )


def task(**inputs: object) -> StageTask:
    return made_of("train-dpo", ROOT, inputs, {})


def test_a_task_runs_far_away_what_the_step_would_have_run(root: str, tmp_path: Path) -> None:
    split = prepared(root, tmp_path / "train")
    inputs = {"data": split}
    made = made_of("augment-rationales", root, inputs, TEACHER, threads=1)
    # The step's disk is not the pod's.
    Path(split).unlink()
    told = StageTask.from_json(made.model_dump_json())
    assert told == made
    assert finished_stage(told.stage, told.uri()) is None
    done = told.run()
    assert storage.join(done.uri, "..") == told.uri()
    assert finished_stage(told.stage, told.uri()) == done
    assert done.figures["given"] == 8


def test_a_list_and_an_input_that_is_not_given_arrive_as_they_are(tmp_path: Path) -> None:
    paths = [reference(tmp_path / name, f"{ROOT}/{name}") for name in ("a", "b")]
    made = StageTask.from_json(
        task(data=paths[0], candidates=paths, rationales=None).model_dump_json()
    )
    with made._artifacts() as inputs:
        assert inputs["rationales"] is None
        found = inputs["candidates"]
        assert isinstance(found, list)
        uris = [Reference.model_validate_json(Path(path).read_text()).uri for path in found]
    assert uris == [f"{ROOT}/a", f"{ROOT}/b"]


def test_the_place_is_that_of_the_step(root: str, tmp_path: Path) -> None:
    inputs = {
        "data": prepared(root, tmp_path / "train"),
        "preferences": reference(tmp_path / "preferences", f"{root}/curate-preference/key"),
        "policy": policy(tmp_path / "policy.json", f"{root}/tune-rationale/key/adapter"),
    }
    settings = {"config": {"learning_rate": 1.0, "lora": {"rank": 2.0, "alpha": 4.0}}, "seed": 0.0}
    made = made_of("train-dpo", root, inputs, settings)
    assert made.uri() == locate_stage("train-dpo", root, inputs=inputs, settings=settings)
    assert made.uri().startswith(f"{root}/train-dpo/")
    # How often a training saves its state does not make it a different one.
    config = {**settings["config"], "checkpoint_minutes": 7}  # type: ignore[dict-item]
    other = made.model_copy(update={"settings": {**settings, "config": config}})
    assert other.uri() == made.uri()


def test_hub_ids_and_the_models_of_the_package_are_seen_everywhere(tmp_path: Path) -> None:
    found = ("embedded:lvlm", "llava-hf/llava-1.5-7b-hf", "s3://models/llava", f"{CACHE}/llava")
    for base in found:
        made = task(policy=policy(tmp_path / "policy.json", f"{ROOT}/adapter", base=base))
        assert base in str(made.inputs["policy"])


def test_what_the_pods_do_not_see_is_refused_with_what_to_do(tmp_path: Path) -> None:
    split = tmp_path / "mine.parquet"
    split.write_bytes(b"PAR1\xff")
    adapter = str(tmp_path / "adapter")
    wrong = [
        (str(split), "is neither a reference nor a policy"),
        (str(tmp_path), "is neither a reference nor a policy"),
        (str(tmp_path / "none"), "is neither a reference nor a policy"),
        (reference(tmp_path / "a", "/data/train.parquet"), "names /data/train.parquet"),
        (policy(tmp_path / "b.json", adapter), f"names {adapter}"),
        (policy(tmp_path / "c.json", base="/models/llava"), "names /models/llava"),
    ]
    for path, message in wrong:
        with pytest.raises(UserError, match=message) as caught:
            task(data=path)
        assert "The input data of train-dpo" in str(caught.value)
        assert "import-output" in str(caught.value)


def test_a_text_that_is_no_task_is_told() -> None:
    with pytest.raises(UserError, match=r"Invalid task: artifact_root is required"):
        StageTask.from_json('{"stage": "train-dpo"}')


TRAINED: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "tune-rationale": (
        {"data": "split", "rationales": "split"},
        {"config": {"samples": 8, **RATE, **LORA}, "model": {"path": "org/lvlm"}},
    ),
    "train-scorer": (
        {"data": "split", "labelled_pairs": "split"},
        {"config": RATE, "annotation": {"samples": 4}, "model": {"path": "embedded:rating"}},
    ),
    "train-dpo": (
        {"data": "split", "preferences": "split", "policy": "policy.json"},
        {"config": {**RATE, **LORA}},
    ),
}
"""Inputs, by their files, and settings of every stage that trains."""


@pytest.mark.parametrize("stage", [name for name, stage in STAGES.items() if stage.trains])
def test_a_task_is_made_and_located_without_torch_and_pyarrow(
    stage: str, root: str, tmp_path: Path
) -> None:
    prepared(root, tmp_path / "split")
    policy(tmp_path / "policy.json")
    inputs, settings = TRAINED[stage]
    code = f"""
import sys
for name in ("torch", "pyarrow", "transformers", "datasets", "PIL", "huggingface_hub"):
    sys.modules[name] = None
from srccore.cluster.task import StageTask, check_checkpoints, read_artifacts
from srccore.steps.step import finished_stage
settings = {settings | {"seed": 0}}
check_checkpoints("{stage}", settings)
task = StageTask(
    stage="{stage}",
    artifact_root="{root}",
    inputs=read_artifacts("{stage}", {inputs}),
    settings=settings,
)
assert finished_stage(task.stage, task.uri()) is None
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", ["org/name", "s3://models/llava", f"{CACHE}/llava"])
def test_a_checkpoint_that_the_pods_reach_may_be_in_a_setting(path: str) -> None:
    check_checkpoints("tune-rationale", {"model": {"path": path}})


@pytest.mark.parametrize("path", ["/models/llava", "./llava", "~/llava", "a/b/c"])
def test_a_checkpoint_on_the_disk_of_the_step_is_refused_with_its_setting(path: str) -> None:
    with pytest.raises(UserError, match=f"rating_model.path of train-scorer is {path}, which"):
        check_checkpoints("train-scorer", {"model": {"path": path}})
