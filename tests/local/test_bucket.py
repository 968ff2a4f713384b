"""Steps whose policy lies in a bucket: adapters travel by URI, from cache to cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import s3_server
from s3_server import S3Server
from shrunken import shrunken

from srccore import storage
from srccore.steps.step import import_output, run_stage

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
    # Policies of a team may lie in a bucket of their own.
    root, mine = f"{bucket.uri}/artifacts", f"{moto.with_new_bucket().uri}/tune-rationale"
    storage.publish(finished / "tune-rationale", mine)
    before, after, page = (str(tmp_path / name) for name in ("before", "after", "evaluation"))
    import_output(f"{mine}/policy.json", before)
    config = shrunken()
    compute = {"device": "cpu", "threads": 1}

    monkeypatch.setenv("SRCCORE_CACHE", str(tmp_path / "training pod"))
    trained = run_stage(
        "train-dpo",
        root,
        inputs={
            "data": str(finished / "data" / "calibration.parquet"),
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
            "data": str(finished / "data" / "heldout.parquet"),
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
