"""Steps whose policy and data are in a bucket: adapters and images are fetched when needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import s3_server
from s3_server import S3Server
from shrunken import shrunken

from srccore import storage
from srccore.data.dataset import open_data
from srccore.stages.manifest import read_manifest
from srccore.stages.table import STAGES, Stage
from srccore.steps.step import import_output, locate_stage, publish_stage, run_stage

moto, no_aws = s3_server.moto, s3_server.no_aws


def test_a_policy_trained_in_one_pod_is_evaluated_in_another(
    finished: Path,
    no_aws: None,
    moto: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = moto.with_new_bucket()
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    # A team may keep its policies in a separate bucket.
    root, mine = f"{bucket.uri}/artifacts", f"{moto.with_new_bucket().uri}/tune-rationale"
    storage.publish(finished / "tune-rationale", mine)
    storage.publish(finished / "data", f"{root}/data")
    before, after, page = (str(tmp_path / name) for name in ("before", "after", "evaluation"))
    import_output(f"{mine}/policy.json", before)
    for split in ("calibration", "heldout"):
        import_output(f"{root}/data/{split}.parquet", str(tmp_path / split))
    config = shrunken()
    compute = {"device": "cpu", "threads": 1}

    monkeypatch.setenv("SRCCORE_CACHE", str(tmp_path / "training pod"))
    trained = run_stage(
        "train-dpo",
        root,
        inputs={
            "data": str(tmp_path / "calibration"),
            "preferences": str(finished / "round-1" / "curate-preference"),
            "policy": before,
        },
        settings={"config": config.dpo.model_dump(), "seed": config.seed},
        **compute,
    )
    trained.write_policy(after)
    adapters = json.loads(Path(after).read_text())["policy"]["adapters"]
    assert adapters == [f"{mine}/adapter", f"{trained.uri}/adapter"]

    monkeypatch.setenv("SRCCORE_CACHE", str(tmp_path / "evaluating pod"))
    done = run_stage(
        "evaluate",
        root,
        inputs={
            "data": str(tmp_path / "heldout"),
            "policy": after,
            "previous": str(finished / "round-0" / "evaluate"),
        },
        settings={
            "config": config.evaluation.model_dump(),
            "seed": config.seed,
            "round_number": 1,
        },
        **compute,
    )
    done.refer(page)
    expected = json.loads((finished / "round-1" / "evaluate" / "figures.json").read_text())
    assert done.figures == expected
    assert json.loads(Path(page).read_text())["uri"] == done.uri
    # Images were fetched one by one.
    assert not list(tmp_path.rglob("*.parquet"))
    heldout = open_data(finished / "data" / "heldout.parquet")
    kept = {path.name for path in (tmp_path / "evaluating pod" / "parts").glob("*/*")}
    assert kept == {heldout.image_key(sample.id) for sample in heldout}


PLACES = {
    "prepare-data": "data",
    "augment-rationales": "augment-rationales/train",
    "tune-rationale": "tune-rationale",
    "sample-responses": "sample-responses",
    "annotate-ratings": "annotate-ratings",
    "train-scorer": "train-scorer",
    "search-candidates": "round-1/search-candidates-0",
    "score-candidates": "round-1/score-candidates-0",
    "curate-preference": "round-1/curate-preference",
    "train-dpo": "round-1/train-dpo",
    "evaluate": "round-1/evaluate",
}
"""Where a run keeps the output of each stage."""


@pytest.mark.parametrize("stage", [each for each in STAGES.values() if each.module], ids=str)
def test_a_stage_that_is_finished_in_a_bucket_is_found_there(
    stage: Stage,
    finished: Path,
    no_aws: None,
    moto: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bucket = moto.with_new_bucket()
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SRCCORE_CACHE", str(tmp_path / "cache"))
    config = shrunken().model_dump(mode="json")
    inputs = {}
    for each in stage.inputs:
        folder = finished / PLACES[each.made_by]
        is_split = each.made_by == "prepare-data"
        path = str(folder / f"{each.output}.parquet" if is_split else folder)
        inputs[each.name] = [path] if each.many else path
    settings = {name: config[section] for name, section in stage.sections.items()}
    further = {"seed": 0, "round_number": 1, "shard": [0, 1]}
    settings |= {name: further[name] for name in stage.settings}
    uri = locate_stage(stage.name, bucket.uri, inputs=inputs, settings=settings)
    # Publishing adds the address, and moves the folder into the cache.
    copy = shutil.copytree(finished / PLACES[stage.name], tmp_path / "copy")
    published = publish_stage(copy, uri)
    found = run_stage(stage.name, bucket.uri, inputs=inputs, settings=settings)
    assert found == published
    assert found.figures == read_manifest(finished / PLACES[stage.name]).figures
    assert f"{stage.name} is finished already" in capsys.readouterr().err
