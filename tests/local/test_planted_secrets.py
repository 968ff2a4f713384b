"""Secrets in the environment of a run are in none of its files, objects and messages."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import s3_server
from endpoint import fails, name_of, says, serving
from PIL import Image
from s3_server import S3Server

from srccore.data.dataset import write_data
from srccore.data.records import Category, Sample

moto, no_aws = s3_server.moto, s3_server.no_aws

KEY = "sk-planted-teacher-4711"
PLANTED = {
    "TEACHER_KEY": KEY,
    "AWS_SECRET_ACCESS_KEY": "planted-secret-access-key",
    "AWS_SESSION_TOKEN": "planted-session-token",
    "HF_TOKEN": "hf_planted",
    "KFP_TOKEN": "planted-kfp-token",
    "KFP_COOKIES": "session=planted-cookie",
    "HTTPS_PROXY": "http://ann:planted-proxy-password@127.0.0.1:9",
}
STAGES = """
import sys
from pathlib import Path
from srccore.steps.step import run_stage
root, source, url, folder = sys.argv[1:]
sizes = {"train": 12, "calibration": 4, "heldout": 4}
done = run_stage("prepare-data", root, inputs={}, settings={"config": {"source": source, **sizes}})
done.refer(f"{folder}/train", "train.parquet")
endpoint = {"url": url, "model": "m", "api_key_env": "TEACHER_KEY", "retries": 0}
config = {"teacher": "endpoint", "endpoint": endpoint}
run_stage(
    "augment-rationales", root, inputs={"data": f"{folder}/train"}, settings={"config": config}
)
"""


def source(folder: Path) -> Path:
    image = io.BytesIO()
    Image.new("RGB", (4, 2)).save(image, "PNG")
    samples = [
        Sample(id=f"s{n}", category=Category.CHART, question=f"How many? [s{n}]", answer="8")
        for n in range(60)
    ]
    path = folder / "source.parquet"
    write_data(path, ((sample, image.getvalue()) for sample in samples))
    return path


def leaks(*texts: bytes) -> set[str]:
    secrets = {name: value.encode() for name, value in PLANTED.items()}
    secrets |= {"HTTPS_PROXY": b"planted-proxy-password", "KFP_COOKIES": b"planted-cookie"}
    secrets |= {"AWS_ENDPOINT_URL": b"planted-endpoint-password"}
    return {name for name, value in secrets.items() for text in texts if value in text}


@pytest.mark.parametrize("ends", ["well", "refused by the teacher", "without a store"])
def test_planted_secrets_are_in_nothing_that_a_run_leaves(
    no_aws: None, moto: S3Server, tmp_path: Path, ends: str
) -> None:
    bucket = moto.with_new_bucket()
    environment = {**os.environ, **bucket.environment, **PLANTED, "NO_PROXY": "127.0.0.1"}
    for name in ("HOME", "SRCCORE_CACHE", "TMPDIR"):
        (tmp_path / name).mkdir()
        environment[name] = str(tmp_path / name)
    if ends == "without a store":
        environment["AWS_ENDPOINT_URL"] = "http://ann:planted-endpoint-password@127.0.0.1:9"
    with serving() as teacher:
        # A server that quotes what it was sent, in a refusal or in a reply.
        teacher.script = lambda body, attempt: (
            fails(401, f"{KEY} is not valid")
            if ends == "refused by the teacher"
            else says(f"Your key is {KEY}.\nAnswer: 8")
            if int(name_of(body)) % 2
            else says("There are 8 of them.\nAnswer: 8")
        )
        command = [sys.executable, "-c", STAGES, f"{bucket.uri}/src", source(tmp_path)]
        run = subprocess.run(
            [*command, teacher.url, tmp_path],
            env=environment,
            capture_output=True,
            timeout=300,
            check=False,
        )
    assert run.returncode == (0 if ends == "well" else 2), run.stderr.decode()
    objects = {key: bucket.get(key) for key in bucket.keys()}  # noqa: SIM118  # a method
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert teacher.authorization == ({f"Bearer {KEY}"} if ends != "without a store" else set())
    assert files
    assert leaks(run.stdout, run.stderr, *files, *objects.values()) == set()
