"""Training pods exit as their processes did, and wait for each other, with the real torchrun."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pods
import pytest
import s3_server
from pods import Job, unruly, until
from s3_server import S3Server
from safetensors.torch import load_file
from shrunken import shrunken
from torch.testing import assert_close

from srccore import storage
from srccore.cluster.task import StageTask, read_artifacts
from srccore.steps.step import finished_stage, import_output
from srccore.training.resume import PublishedCheckpoints

jobs = pods.jobs
moto, no_aws = s3_server.moto, s3_server.no_aws
Jobs = Callable[..., Job]

pytestmark = pytest.mark.long

USER_ERROR = 'from srccore.errors import UserError; raise UserError("It is wrong.", "Fix it.")'
ENDS = [
    ("raise ValueError('It is broken.')", 1, "Error: ValueError: It is broken."),
    (USER_ERROR, 2, "Error: It is wrong. Fix it."),
    ("import os; os.kill(os.getpid(), 9)", 137, "was killed by SIGKILL"),
    ("import os; os.kill(os.getpid(), 11)", 139, "was killed by SIGSEGV"),
    ("import os; os._exit(7)", 1, "exited with code 7 and left no message"),
]

DEVICE = r"Device: CPU, 1 thread, .*\n"


@pytest.mark.parametrize(("do", "code", "said"), ENDS, ids=[each[2] for each in ENDS])
def test_a_pod_ends_as_its_process_did_and_says_so_last(
    jobs: Jobs, tmp_path: Path, do: str, code: int, said: str
) -> None:
    pod = jobs(1, unruly(tmp_path, {0: do}), "unruly").start(0)
    assert pod.ends() == code
    assert said in pod.last_line
    # It was not tried again.
    assert pod.log.count("Traceback") <= 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_pod_that_is_told_to_end_takes_its_processes_along(
    jobs: Jobs, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    does = "import os; (folder / 'pid').write_text(str(os.getpid()))"
    pod = jobs(1, unruly(tmp_path, {0: does}), "unruly").start(0)
    until((tmp_path / "pid").exists)
    pod.tell(number)
    assert pod.ends() == code
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def began(folder: Path) -> bool:
    return all((folder / f"began-{rank}").exists() for rank in range(2))


def test_a_pod_outlives_the_loss_of_the_one_where_they_meet(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs(2, unruly(tmp_path, {}, joins=True), "unruly")
    first, second = job.start(0), job.start(1)
    until(lambda: began(tmp_path))
    first.tell(signal.SIGKILL)
    assert first.ends() == -signal.SIGKILL
    for rank in range(2):
        (tmp_path / f"began-{rank}").unlink()
    first = job.start(0)
    until(lambda: began(tmp_path))
    (tmp_path / "go").touch()
    assert (first.ends(), second.ends()) == (0, 0)


def test_what_a_process_raises_ends_its_pod_and_the_other_one_waits(
    jobs: Jobs, tmp_path: Path
) -> None:
    job = jobs(2, unruly(tmp_path, {1: "raise ValueError('It is broken.')"}, joins=True), "unruly")
    first, second = job.start(0), job.start(1)
    assert second.ends() == 1
    assert second.last_line == "Error: ValueError: It is broken."
    # An operator that sees a pod fail stops the others.
    assert first.process.poll() is None
    first.tell(signal.SIGTERM)
    assert first.ends() == 143


def dpo_task(finished: Path, bucket: S3Server, folder: Path) -> StageTask:
    """DPO of the run's first round, slowed down; all inputs are in the bucket."""
    folder.mkdir()
    given = {
        "data": ("data", "calibration.parquet"),
        "preferences": ("round-1/curate-preference", ""),
        "policy": ("tune-rationale", "policy.json"),
    }
    inputs = {}
    for name, (source, file) in given.items():
        uri = f"{bucket.uri}/given/{name}"
        storage.publish(finished / source, uri)
        inputs[name] = str(folder / name)
        import_output(storage.join(uri, file), inputs[name])
    config = shrunken("dpo.epochs=10", "dpo.checkpoint_minutes=1e-9")
    return StageTask(
        stage="train-dpo",
        artifact_root=f"{bucket.uri}/artifacts",
        inputs=read_artifacts("train-dpo", inputs),
        settings={"config": config.dpo.model_dump(mode="json"), "seed": config.seed},
        device="cpu",
        threads=1,
    )


def test_two_pods_of_which_one_is_lost_train_what_one_trains(
    finished: Path,
    no_aws: None,
    moto: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    jobs: Jobs,
) -> None:
    bucket = moto.with_new_bucket()
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    task = dpo_task(finished, bucket, tmp_path / "artifacts")
    uri = task.uri()

    job = jobs(2, task.model_dump_json())
    first, second = job.start(0), job.start(1)
    checkpoints = PublishedCheckpoints(tmp_path / "checkpoint", f"{uri}/checkpoint")
    until(lambda: (checkpoints.newest() or 0) >= 6)
    second.tell(signal.SIGKILL)
    assert second.ends() == -signal.SIGKILL
    second = job.start(1)
    assert (first.ends(), second.ends()) == (0, 0)
    assert "Training resumes from step " in first.log
    # Every pod says what it runs on; all else comes from the first process.
    assert f"Finished train-dpo: {uri}" in first.log
    assert re.fullmatch(DEVICE, second.log)
    done = finished_stage("train-dpo", uri)
    assert done is not None
    assert not storage.exists(f"{uri}/checkpoint")
    manifest = json.loads(storage.read_text(f"{uri}/finished.json"))
    assert not any(name.startswith("checkpoint") for name in manifest["outputs"])

    # A later job finds it done.
    stored = storage.listing(uri)
    again = [job.start(index) for index in range(2)]
    assert [pod.ends() for pod in again] == [0, 0]
    assert again[0].last_line == f"train-dpo is finished already: {done.uri}"
    assert re.fullmatch(DEVICE, again[1].log)
    assert storage.listing(uri) == stored

    other = task.model_copy(update={"artifact_root": f"{moto.with_new_bucket().uri}/artifacts"})
    assert jobs(1, other.model_dump_json()).start(0).ends() == 0
    alone = finished_stage("train-dpo", other.uri())
    assert alone is not None
    figures = [each.figures["training"] | each.figures for each in (done, alone)]
    for name in figures[0].keys() - {"training", "seconds"}:
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-3, abs=1e-4), name
    weights = [
        load_file(storage.fetch(f"{each.uri}/adapter") / "adapter_model.safetensors")
        for each in (done, alone)
    ]
    assert_close(*weights, rtol=1e-2, atol=1e-4)
