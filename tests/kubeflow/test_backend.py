"""Runs the commands against a real Kubeflow Pipelines, at ``KFP_HOST``.

The commands read credentials and namespace from the environment. ``SRCCORE_TEST_KFP_IMAGE`` is the
image of the pods, which must have a shell. The runs and schedules are kept, under unique names.
"""

import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from kfp import compiler, dsl

import srccore

pytestmark = [
    pytest.mark.kubeflow,
    pytest.mark.skipif(not os.environ.get("KFP_HOST"), reason="KFP_HOST is not set"),
]
IMAGE = os.environ.get("SRCCORE_TEST_KFP_IMAGE", "python:3.11-slim")
NAME = f"srccore-test-{uuid.uuid4().hex[:6]}"


@dsl.container_component
def shell(command: str):
    return dsl.ContainerSpec(image=IMAGE, command=["sh", "-c"], args=[command])


@dsl.pipeline(name="srccore-test-round")
def nested(command: str):
    shell(command=command).set_caching_options(False)


@dsl.pipeline(name=NAME, description=f"srccore {srccore.__version__}, a test")
def one_task(artifact_root: str, command: str = "true"):
    nested(command=command).set_display_name("round 1")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "one-task.yaml"
    compiler.Compiler().compile(one_task, str(path))
    return path


def call(*arguments: object, code: int = 0) -> str:
    """Calls a command, and returns its output."""
    result = subprocess.run(
        [sys.executable, "-m", "srccore", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


def submit(pipeline: Path, *options: str, code: int = 0) -> tuple[str, str]:
    """Submits a run; returns its ID and the output of the command."""
    out = call("submit", pipeline, "--artifact-root=s3://none/none", *options, code=code)
    found = re.match(r"Run (\S+)\n", out)
    assert found is not None
    return found[1], out


def test_a_run_is_followed_to_its_end_and_listed(pipeline: Path) -> None:
    run_id, out = submit(pipeline, "--wait", "--interval=2", "--timeout=800")
    assert "[1/1] round 1 / shell: succeeded" in out
    assert "The run ended: SUCCEEDED." in out
    assert run_id in call("runs", "list", "--experiment", NAME)
    assert "1/1" in call("runs", "status", run_id)


def test_an_uploaded_pipeline_is_used_again_and_its_run_is_followed(pipeline: Path) -> None:
    _, first = submit(pipeline, "--upload", "--wait", "--interval=2", "--timeout=800")
    assert "[1/1] round 1 / shell: succeeded" in first
    _, second = submit(pipeline, "--upload")
    found = re.search(r"Pipeline: \S+/version/\S+\n", first)
    assert found is not None
    assert found[0] in second


def test_a_task_that_fails_is_named(pipeline: Path) -> None:
    options = ("--param", "command=exit 3", "--wait", "--interval=2", "--timeout=800")
    _, out = submit(pipeline, *options, code=1)
    assert "Failed: round 1 / shell" in out


def test_a_run_is_stopped(pipeline: Path) -> None:
    run_id, _ = submit(pipeline, "--param", "command=sleep 3600")
    assert "is being stopped" in call("runs", "stop", run_id)
    options = ("--wait", "--interval=2", "--timeout=800")
    call("runs", "status", run_id, *options, code=1)
    assert "has already finished" in call("runs", "stop", run_id)


def test_a_schedule_is_replaced_by_one_of_its_name(pipeline: Path) -> None:
    from srccore.kubeflow.client import connect
    from srccore.kubeflow.connection import Connection

    # On 1 January, so that it starts no run before it is disabled.
    options = ("--artifact-root=s3://none/none", "--name", NAME, "--cron", "0 0 1 1 *")
    first = call("schedule", pipeline, *options)
    second = call("schedule", pipeline, *options)
    old, new = (out.splitlines()[0].removeprefix("Schedule ") for out in (first, second))
    assert f"Disabled the earlier schedule of that name: {old}" in second
    backend = connect(
        Connection(
            host=os.environ["KFP_HOST"],
            namespace=os.environ.get("KFP_NAMESPACE"),
            user_header=os.environ.get("KFP_USER_HEADER"),
        )
    )
    service = backend.recurring_runs
    for each, status in ((old, "DISABLED"), (new, "ENABLED")):
        found = backend.call(service.recurring_run_service_get_recurring_run, recurring_run_id=each)
        assert found.status == status
    backend.call(service.recurring_run_service_disable_recurring_run, recurring_run_id=new)
