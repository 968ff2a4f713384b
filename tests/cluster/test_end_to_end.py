"""The compiled pipeline on a real cluster: steps as pods, DPO as a job of two pods.

It follows the steps of an administrator and a user: install the single-node overlay, push the
images, compile the pipeline of a shrunken `tiny` with the overlay's profile. Accounts, roles, quota
and Pod Security are the shipped ones. `pipeline_pods` replaces Kubeflow itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cluster.installation import EXACT, METHOD, Site
from cluster.pipeline_pods import Pods
from local.shrunken import Recorder, shrunken

from srccore.data.records import Preference, read_records
from srccore.run.loop import run


def srccore(*words: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "srccore", *map(str, words)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def looped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`srccore run` over two shards, on this machine."""
    out = tmp_path_factory.mktemp("looped") / "run"
    run(shrunken("shards=2", EXACT), out, Recorder())
    return out


@pytest.fixture(scope="module")
def brought(site: Site, pods: Pods, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder that `srccore collect` creates from the bucket."""
    keys = site.store.keys()
    (report,) = {key.split("/")[2] for key in keys if key.startswith("src/report/")}
    out = tmp_path_factory.mktemp("brought") / "run"
    uri = f"{site.artifact_root}/report/{report}"
    srccore("collect", uri, "-o", out, **site.store.environment)
    return out


def test_every_task_succeeded_as_a_pod_of_its_own(pods: Pods) -> None:
    ended = [pod for pod in pods.finished if pod["status"]["phase"] == "Succeeded"]
    stages = [pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in ended]
    assert stages.count("search-candidates") == stages.count("score-candidates") == 2
    assert {"prepare-data", "tune-rationale", "train-scorer", "train-dpo", "report"} <= set(stages)


def test_preferences_and_figures_are_those_of_srccore_run(looped: Path, brought: Path) -> None:
    def preferences(folder: Path) -> list[Preference]:
        file = folder / "round-1" / "curate-preference" / "preferences.jsonl"
        return list(read_records(file, Preference))

    assert preferences(brought) == preferences(looped) != []
    local, remote = (json.loads((each / "figures.json").read_text()) for each in (looped, brought))
    assert remote == local


def test_two_pods_trained_as_one_process_does(looped: Path, brought: Path) -> None:
    def figures(folder: Path) -> dict[str, float]:
        found = json.loads((folder / "round-1/train-dpo/manifest.json").read_text())["figures"]
        return {**found.pop("training"), **found.pop("folding"), **found}

    local, remote = figures(looped), figures(brought)
    assert local.pop("seconds") and remote.pop("seconds")
    assert remote == pytest.approx(local, rel=1e-4, abs=1e-6)


def test_the_job_is_owned_by_the_workflow_and_kept_as_an_artifact(site: Site, pods: Pods) -> None:
    keys = site.store.keys()
    (key,) = (key for key in keys if key.endswith("/job.yaml"))
    asked = yaml.safe_load(site.store.get(key))
    (job,) = site.jobs()
    assert job["metadata"]["name"] == asked["metadata"]["name"]
    assert job["metadata"]["ownerReferences"][0]["uid"] == pods.workflow.uid
    conditions = {each["type"]: each["status"] for each in job["status"]["conditions"]}
    assert conditions["Succeeded"] == "True"
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 2


def test_the_steps_log_shows_the_training(pods: Pods) -> None:
    (log,) = (text for name, text in pods.logs.items() if "-train-dpo-" in name)
    assert "Created PyTorchJob srccore/" in log and "(kubeflow.org/v1)." in log
    assert "2 pods are running" in log
    assert "Finished train-dpo: " in log
    assert "has succeeded" in log


def test_nothing_of_ours_ran_as_root_or_wrote_to_its_root(site: Site, pods: Pods) -> None:
    for pod in site.training_pods():
        security = pod["spec"]["containers"][0]["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    for pod in pods.finished:
        assert pod["spec"]["containers"][0]["securityContext"]["runAsUser"] == 1000


def test_a_wrong_key_is_refused_and_said_so(site: Site, tmp_path: Path) -> None:
    package = site.compile(tmp_path / "src.yaml", "--rounds", "1", secret="wrong-keys")
    arguments = {**site.arguments(package, *METHOD), "seed": 1}
    pods = site.pods(package, arguments, prefix="wrong", retries=0)
    with pytest.raises(RuntimeError, match="prepare-data"):
        pods.run(tmp_path / "kubeflow")
    (log,) = pods.logs.values()
    assert "Error: " in log and "SignatureDoesNotMatch" in log
    assert "Traceback" not in log
