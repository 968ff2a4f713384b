"""The pages for platform teams: their commands run in order against a backend."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from backend_commands import call
from kfp_server import KfpServer, Step

from srccore.config import load_config
from srccore.data.records import CandidateSet, read_records
from srccore.models.policy import parse_policy
from srccore.pipelines.compiling import share_warnings
from srccore.pipelines.profile import Profile, Resources, StageSecretKeys, TrainingJobs
from srccore.pipelines.regenerate import ROOT

HOST = "https://kubeflow.example.com/pipeline"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_commands_of_the_pipelines_page_run(
    server: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server.script = [Step("RUNNING"), Step("SUCCEEDED")]
    run_id = "RUN_ID"
    ran = []
    for line in "".join(blocks("pipelines.md", "sh")).replace("\\\n", "").splitlines():
        words = shlex.split(line.replace(HOST, server.url).replace("RUN_ID", run_id))
        if words[1] in ("pipeline-local", "collect", "export"):
            continue  # tests/local runs them
        if "--wait" in words:
            words.append("--interval=0.01")
        outcome = call(*words[1:])
        assert outcome.code == 0, (line, outcome.out)
        ran.append(words[1])
        if words[1] == "submit":
            run_id = re.search(r"Run (\S+)", outcome.out)[1]
    assert ran == ["compile", "submit", "submit", "schedule", "runs", "runs", "runs", "runs"]


def test_the_profile_on_the_page_is_one_and_names_every_field() -> None:
    text, every_stage = blocks("pipelines.md", "yaml")
    values = yaml.safe_load(text)
    Profile.model_validate(values)
    on_the_command_line = {"rounds", "shards"}
    assert set(values) | on_the_command_line == set(Profile.model_fields)
    assert set(values["models"]) == set(Resources.model_fields)
    assert set(values["training_job"]) == set(TrainingJobs.model_fields)
    assert set(StageSecretKeys.model_fields) == set().union(*values["secrets"])
    profile = Profile.model_validate(yaml.safe_load(every_stage))
    for stage in profile.training_job.stages:
        assert profile.training_job.pods * profile.resources(stage).gpus == 8
    assert list(share_warnings(load_config("llava-1.5-7b"), profile)) == []


def test_the_forms_on_the_components_page_are_read(tmp_path: Path) -> None:
    policy, candidates = blocks("components.md", "json")
    assert parse_policy(policy, "the page").adapters == ()
    path = tmp_path / "candidates.jsonl"
    path.write_text(candidates)
    (found,) = read_records(path, CandidateSet)
    assert len(found.candidates) == 2


def test_every_component_is_on_the_page() -> None:
    text = (ROOT / "docs" / "components.md").read_text()
    for path in (ROOT / "components").glob("*/README.md"):
        assert f"(../components/{path.parent.name})" in text
