"""The examples compile with the command in their first lines, and run on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import components, local

from srccore.containers.names import Images
from srccore.data.records import CandidateSet, Preference, read_records
from srccore.pipelines.regenerate import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
COMPUTE = {"device": "cpu", "threads": 1}


def run(name: str, folder: Path, **arguments: Any) -> Any:
    """Compiles an example by its own command and runs the file."""
    package = folder / f"{name}.yaml"
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), str(package)]
    subprocess.run(command, check=True)
    runner = local.SubprocessRunner(use_venv=False)
    local.init(runner, pipeline_root=str(folder / "kubeflow"), raise_on_error=True)
    pipeline = components.load_component_from_file(str(package))
    return pipeline(artifact_root=str(folder / "artifacts"), **arguments)


def test_a_component_file_is_used_in_another_pipeline(finished: Path, tmp_path: Path) -> None:
    task = run(
        "search_only",
        tmp_path,
        data_uri=str(finished / "data" / "calibration.parquet"),
        policy_uri=str(finished / "tune-rationale" / "policy.json"),
        **COMPUTE,
    )
    (manifest,) = (tmp_path / "artifacts").glob("search-candidates/*/manifest.json")
    figures = json.loads(manifest.read_text())["figures"]
    assert figures["samples"] == 12
    assert task.output == figures["candidates"] > 12


def test_the_python_components_are_used_in_another_pipeline(finished: Path, tmp_path: Path) -> None:
    run(
        "beam_or_sample",
        tmp_path,
        policy_uri=str(finished / "tune-rationale" / "policy.json"),
        scorer_uri=str(finished / "train-scorer"),
        **COMPUTE,
    )
    manifests = list((tmp_path / "artifacts").glob("search-candidates/*/manifest.json"))
    strategies = {json.loads(path.read_text())["config"]["strategy"] for path in manifests}
    assert strategies == {"beam", "sample"}
    assert len(list((tmp_path / "artifacts").glob("score-candidates/*/ratings.jsonl"))) == 2


def test_candidates_that_are_there_are_scored_and_curated(finished: Path, tmp_path: Path) -> None:
    task = run(
        "score_and_curate",
        tmp_path,
        data_uri=str(finished / "data" / "calibration.parquet"),
        scorer_uri=str(finished / "train-scorer"),
        candidates_uris=[str(finished / "round-1" / "search-candidates-0")],
        curation={"min_margin": 0, "answer_gate": "off", "anchor_tolerance": 1},
        **COMPUTE,
    )
    uri = json.loads(Path(task.output.path).read_text())["uri"]
    given = finished / "round-1" / "search-candidates-0" / "candidates.jsonl"
    candidates = {
        record.sample_id: {each.id for each in record.candidates}
        for record in read_records(given, CandidateSet)
    }
    found = list(read_records(Path(uri) / "preferences.jsonl", Preference))
    assert len(found) > len(candidates) / 2
    for preference in found:
        pair = {preference.chosen.id, preference.rejected.id}
        assert len(pair) == 2 and pair <= candidates[preference.sample_id]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_names_images_of_this_release(path: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(path), str(tmp_path / "package.yaml")], check=True)
    spec = next(yaml.safe_load_all((tmp_path / "package.yaml").read_text()))
    for executor in spec["deploymentSpec"]["executors"].values():
        image = executor["container"]["image"]
        stage = image.rpartition("/")[2].partition(":")[0]
        assert image == Images().of(stage)
