"""S3 servers on this machine: moto in this process, and versitygw, which checks keys and policies.

A test module imports the four fixtures at the end by name: ``s3 = s3_server.s3`` and so on. A test
that uses ``s3`` runs against both servers, with a bucket and a cache of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from cluster.build import program

from srccore import storage

STARTS_WITHIN = 30.0


@dataclasses.dataclass(frozen=True)
class S3Server:
    """A running server and one of its buckets, which starts empty."""

    endpoint: str
    key: str
    secret: str
    bucket: str

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def environment(self) -> dict[str, str]:
        """What boto3 needs to find the server, and to give up at once."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_MAX_ATTEMPTS": "1",
        }

    def client(self) -> Any:
        """A separate client for tests, independent of the environment."""
        return _client(self.endpoint, self.key, self.secret)

    def with_new_bucket(self) -> S3Server:
        made = dataclasses.replace(self, bucket=f"test-{uuid.uuid4().hex[:12]}")
        made.client().create_bucket(Bucket=made.bucket)
        return made

    def put(self, key: str, data: bytes = b"data") -> None:
        self.client().put_object(Bucket=self.bucket, Key=key, Body=data)

    def get(self, key: str) -> bytes:
        """The content of an object.

        Raises:
            KeyError: There is no such object.
        """
        try:
            return bytes(self.client().get_object(Bucket=self.bucket, Key=key)["Body"].read())
        except self.client().exceptions.NoSuchKey:
            raise KeyError(key) from None

    def delete(self, key: str) -> None:
        self.client().delete_object(Bucket=self.bucket, Key=key)

    def keys(self) -> list[str]:
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return [each["Key"] for page in pages for each in page.get("Contents", [])]

    def with_user_who_may(self, *actions: str) -> S3Server:
        """The same bucket for a user with only these permissions. Only versitygw has users."""
        user = dataclasses.replace(self, key=f"user-{uuid.uuid4().hex[:8]}", secret="their-secret")
        root = [
            f"--access={self.key}",
            f"--secret={self.secret}",
            f"--endpoint-url={self.endpoint}",
        ]
        given = [f"--access={user.key}", f"--secret={user.secret}", "--role=user"]
        subprocess.run(
            [str(program("versitygw")), "admin", *root, "create-user", *given],
            check=True,
            capture_output=True,
        )
        if actions:
            statement = {
                "Effect": "Allow",
                "Principal": {"AWS": [user.key]},
                "Action": list(actions),
                "Resource": [f"arn:aws:s3:::{self.bucket}", f"arn:aws:s3:::{self.bucket}/*"],
            }
            policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
            self.client().put_bucket_policy(Bucket=self.bucket, Policy=policy)
        return user


@functools.cache
def _client(endpoint: str, key: str, secret: str) -> Any:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )


@contextlib.contextmanager
def serving(kind: str, folder: Path) -> Iterator[S3Server]:
    """Starts a server with an empty bucket.

    Args:
        kind: ``moto`` (does not check access keys, accepts any object key) or ``versitygw``.
        folder: Where the server keeps its files.
    """
    start = {"moto": _moto, "versitygw": _versitygw}[kind]
    with start(folder) as server:
        yield server.with_new_bucket()


@contextlib.contextmanager
def _moto(folder: Path) -> Iterator[S3Server]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(f"http://{host}:{port}", "any-key", "any-secret", "")
    finally:
        server.stop()


@contextlib.contextmanager
def _versitygw(folder: Path) -> Iterator[S3Server]:
    executable = program("versitygw")
    assert executable is not None, "versitygw is not built: python -m tests.cluster.build"
    server = S3Server(f"http://127.0.0.1:{free_port()}", "the-key", "the-secret", "")
    kept = {name: folder / name for name in ("data", "sidecar", "iam")}
    for path in kept.values():
        path.mkdir(parents=True)
    command = [
        *(str(executable), "--quiet", "--port", server.endpoint.removeprefix("http://")),
        *("--access", server.key, "--secret", server.secret, "--iam-dir", str(kept["iam"])),
        *("posix", "--sidecar", str(kept["sidecar"]), str(kept["data"])),
    ]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as it,
    ):
        try:
            _wait_until_it_answers(server, it, folder / "log")
            yield server
        finally:
            it.kill()


def _wait_until_it_answers(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    host, _, port = server.endpoint.removeprefix("http://").partition(":")
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.02)
    raise RuntimeError(f"The server did not start: {log.read_text(errors='replace')}")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Fixtures


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serving("moto", tmp_path_factory.mktemp("moto")) as it:
        yield it


@pytest.fixture(scope="session")
def versitygw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if program("versitygw") is None:
        pytest.skip("versitygw is not built: python -m tests.cluster.build")
    with serving("versitygw", tmp_path_factory.mktemp("versitygw")) as it:
        yield it


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hides this machine's settings: no AWS variables, no profile, an empty cache; no patience."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("SRCCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "PAUSES", ())


@pytest.fixture(params=["moto", "versitygw"])
def s3(request: pytest.FixtureRequest, no_aws: None, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An empty bucket on each server, to which the environment points."""
    server: S3Server = request.getfixturevalue(request.param)
    it = server.with_new_bucket()
    for name, value in it.environment.items():
        monkeypatch.setenv(name, value)
    return it
