"""A pod is lost or stopped in the middle of a stage; another one resumes with an empty disk."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3_server
from endpoint import Reply, Server, fails, name_of, says, serving
from PIL import Image
from pods import WITHIN, until
from s3_server import S3Server

from srccore import storage
from srccore.config import ModelConfig
from srccore.data import dataset
from srccore.data.records import (
    Candidate,
    CandidateSet,
    Category,
    Rationale,
    Sample,
    read_records,
    write_records,
)
from srccore.embedded.world import make_item
from srccore.models.policy import Policy, resolve_model_path, write_policy
from srccore.stages import candidates
from srccore.stages.manifest import read_manifest
from srccore.steps.step import run_stage

moto, versitygw = s3_server.moto, s3_server.versitygw
no_aws, s3 = s3_server.no_aws, s3_server.s3

PART = 4
STEP = """
import json, sys
from srccore.models import teacher
from srccore.stages import candidates, parts
from srccore.steps.step import run_stage
parts.SAMPLES = 4
candidates.SCORING_CHUNK = 1
teacher.STOPS_WITHIN = float(sys.argv[2])
run_stage(**json.loads(sys.argv[1]))
"""
TEXT = "It is so.\nAnswer: 8"


@dataclasses.dataclass
class Pods:
    """Pods that share nothing but a bucket.

    Attributes:
        step: The arguments of `run_stage`.
        folder: Has a disk for each pod.
        bucket: The bucket.
    """

    step: dict[str, Any]
    folder: Path
    bucket: S3Server

    def start(self, name: str, stops_within: float = 60.0) -> subprocess.Popen[bytes]:
        """Starts the step in a pod with an empty disk."""
        self.folder.mkdir(exist_ok=True)
        environment = {**os.environ, "SRCCORE_CACHE": str(self.folder / name)}
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-c", STEP, json.dumps(self.step), str(stops_within)],
                env=environment,
                stdout=log,
                stderr=log,
            )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def journal(self, name: str) -> list[bytes]:
        """The lines on the disk of a pod."""
        (path,) = (self.folder / name).rglob("journal.jsonl")
        return path.read_bytes().splitlines()

    def parts(self) -> list[bytes]:
        """The lines in the bucket, without those that begin a part."""
        stored = self.bucket.keys()
        keys = sorted(key for key in stored if "/parts/" in key)
        return [line for key in keys for line in self.bucket.get(key).splitlines()[1:]]

    @staticmethod
    def samples(lines: list[bytes]) -> set[str]:
        return {json.loads(line)["sample_id"] for line in lines}

    def finish(self, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
        """Does the step in a pod with an empty disk, and returns its folder there."""
        monkeypatch.setenv("SRCCORE_CACHE", str(self.folder / name))
        done = run_stage(**self.step)
        assert not self.parts()
        return storage.local_path(done.uri)


# Teachers


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as it:
        yield it


SAMPLES = 20


@pytest.fixture
def augmenting(tmp_path: Path, s3: S3Server, server: Server) -> Pods:
    """A teacher is asked for 20 rationales, two at a time."""
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    rows = [
        (
            Sample(id=f"s{n:02}", category=Category.MATH, question=f"Why? [s{n:02}]", answer="8"),
            picture.getvalue(),
        )
        for n in range(SAMPLES)
    ]
    dataset.write_data(tmp_path / "data.parquet", rows)
    endpoint = {"url": server.url, "model": "m", "concurrency": 2, "retries": 0}
    step = {
        "stage": "augment-rationales",
        "artifact_root": s3.uri,
        "inputs": {"data": str(tmp_path / "data.parquet")},
        "settings": {"config": {"teacher": "endpoint", "endpoint": endpoint}},
    }
    return Pods(step, tmp_path / "pods", s3)


def hold_after(server: Server, answered: int) -> threading.Event:
    """Makes the server answer so many requests, and the next ones once the event is set."""
    released = threading.Event()

    def script(body: dict[str, Any], attempt: int) -> Reply:
        if len(server.seen) > answered:
            released.wait(120)
        # One sample gets an answer that is of no use.
        return says("Who knows?" if name_of(body) == "03" else TEXT)

    server.script = script
    return released


def test_a_teacher_that_is_stopped_has_nothing_paid_twice(
    augmenting: Pods, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = hold_after(server, answered=10)
    pod = augmenting.start("first")
    until(lambda: len(server.seen) == 12)
    pod.send_signal(signal.SIGTERM)
    until(lambda: "Stopped by SIGTERM" in augmenting.log("first"))
    released.set()
    assert pod.wait(WITHIN) == 143
    assert "Traceback" not in augmenting.log("first")
    # The answers to the two open requests came, and no new ones were sent.
    assert len(augmenting.parts()) == len(server.seen) == 12

    folder = augmenting.finish(monkeypatch, "second")
    assert len(server.attempts) == SAMPLES
    assert set(server.attempts.values()) == {1}
    made = list(read_records(folder / "rationales.jsonl", Rationale))
    assert [each.sample_id for each in made] == [f"s{n:02}" for n in range(SAMPLES) if n != 3]
    figures = read_manifest(folder).figures
    assert figures == {
        "given": 0,
        "made": 19,
        "problems": {"no rationale followed by one answer line": 1},
    }


def test_a_teacher_that_does_not_answer_does_not_hold_up_a_stopped_pod(
    augmenting: Pods, server: Server
) -> None:
    released = hold_after(server, answered=10)
    pod = augmenting.start("first", stops_within=0.2)
    until(lambda: len(server.seen) == 12)
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(WITHIN) == 143
    released.set()
    assert "Traceback" not in augmenting.log("first")
    assert len(augmenting.parts()) == 10


def test_a_lost_pod_loses_at_most_a_part_of_a_teachers_answers(
    augmenting: Pods, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = hold_after(server, answered=10)
    pod = augmenting.start("first")
    until(lambda: len(server.seen) == 12 and len(augmenting.parts()) == 2 * PART)
    pod.kill()
    pod.wait(WITHIN)
    released.set()
    augmenting.finish(monkeypatch, "second")
    # 8 of the 10 answers were in two parts, and two requests were open.
    assert sorted(server.attempts.values()) == [1] * (SAMPLES - 4) + [2] * 4


def test_an_error_of_the_teacher_keeps_its_answers(
    augmenting: Pods, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script = lambda body, attempt: says(TEXT) if len(server.seen) <= 10 else fails(401)
    assert augmenting.start("first").wait(WITHIN) == 2
    assert "refused the key" in augmenting.log("first")
    assert len(augmenting.parts()) == 10
    server.script = lambda body, attempt: says(TEXT)
    augmenting.finish(monkeypatch, "second")
    assert sum(attempts == 1 for attempts in server.attempts.values()) >= 18


# Models

OUTPUTS = {
    "search-candidates": "candidates.jsonl",
    "score-candidates": "ratings.jsonl",
    "evaluate": "responses.jsonl",
}


@pytest.fixture
def models(tmp_path: Path, no_aws: None) -> dict[str, dict[str, Any]]:
    """The arguments of steps that run a model, each with batches of one or two samples."""
    rows = []
    for number in range(SAMPLES):
        item = make_item(0, "heldout", number)
        buffer = io.BytesIO()
        item.image.save(buffer, "PNG")
        rows.append((item.sample, buffer.getvalue()))
    data, policy = tmp_path / "data.parquet", tmp_path / "policy.json"
    dataset.write_data(data, rows)
    write_policy(policy, Policy(base=ModelConfig(path="embedded:lvlm")))
    sets = [
        CandidateSet(
            sample_id=sample.id,
            candidates=tuple(
                Candidate(id=text, text=f"It is {text}.", log_probability=-1, token_count=5)
                for text in "abcde"
            ),
        )
        for sample, _ in rows
    ]
    (tmp_path / "candidates").mkdir()
    write_records(tmp_path / "candidates" / "candidates.jsonl", CandidateSet, sets)
    shutil.copytree(resolve_model_path("embedded:rating"), tmp_path / "scorer" / "model")
    small = {"batch_tokens": 120}
    given = {"data": str(data), "policy": str(policy)}
    numbers = {"seed": 0, "round_number": 1}
    search = {**small, "samples": SAMPLES, "width": 2, "branch": 2}
    rated = {name: str(tmp_path / name) for name in ("candidates", "scorer")}
    return {
        "search-candidates": {
            "inputs": given,
            "settings": {"config": search, "shard": [0, 1], **numbers},
        },
        "score-candidates": {
            "inputs": {"data": str(data), **rated},
            "settings": {"config": small},
        },
        "evaluate": {
            "inputs": given,
            "settings": {"config": {**small, "resamples": 100, "max_tokens": 24}, **numbers},
        },
    }


@pytest.mark.parametrize(
    ("stage", "signal_number"),
    [*((stage, signal.SIGKILL) for stage in OUTPUTS), ("search-candidates", signal.SIGTERM)],
)
def test_another_pod_ends_with_the_same_bytes(
    stage: str,
    signal_number: signal.Signals,
    models: dict[str, dict[str, Any]],
    moto: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = moto.with_new_bucket()
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    step = {"stage": stage, "device": "cpu", "threads": 1, **models[stage]}
    # Part of what decides which ratings are computed together.
    monkeypatch.setattr(candidates, "SCORING_CHUNK", 1)
    pods = Pods({**step, "artifact_root": bucket.uri}, tmp_path / "pods", bucket)
    pod = pods.start("first")
    until(lambda: len(pods.samples(pods.parts())) >= 2 * PART)
    pod.send_signal(signal_number)
    assert pod.wait(WITHIN) == (143 if signal_number == signal.SIGTERM else -signal.SIGKILL)
    kept, done = pods.samples(pods.parts()), pods.samples(pods.journal("first"))
    assert kept <= done
    assert len(done) < SAMPLES
    if signal_number == signal.SIGTERM:
        assert kept == done
    else:
        # A part, and what was done while it was on its way.
        assert len(done - kept) <= 2 * PART

    resumed = pods.finish(monkeypatch, "second")
    whole = storage.local_path(run_stage(**step, artifact_root=str(tmp_path / "whole")).uri)
    name = OUTPUTS[stage]
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    work, all_work = (read_manifest(each).work or {} for each in (resumed, whole))
    assert sum(work.values()) < sum(all_work.values())
