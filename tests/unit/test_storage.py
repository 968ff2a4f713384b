"""Storage, tested against S3 servers on this machine and against local files."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import multiprocessing
import os
import posixpath
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import s3_server
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from s3_server import S3Server, free_port

from srccore import storage
from srccore.errors import UserError
from srccore.files import JOURNAL, MANIFEST

moto, versitygw = s3_server.moto, s3_server.versitygw
s3, no_aws = s3_server.s3, s3_server.no_aws

FILES = {
    "stage.json": b"{}",
    "manifest.json": b'{"figures": {}}',
    "policy.json": b'{"name": "\xc3\xa4"}',
    "adapter/adapter_model.safetensors": bytes(range(256)) * 4096,
    "adapter/empty": b"",
    "a b/100 %+?#.txt": b"a name to be quoted",
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


Hook = Callable[[str, Callable[..., None]], None]


@pytest.fixture
def on(s3: S3Server) -> Iterator[Hook]:
    """Lets a test observe, or interfere with, storage's own client."""
    events, added = storage._client().meta.events, []

    def add(event: str, look: Callable[..., None]) -> None:
        events.register(event, look)
        added.append((event, look))

    yield add
    for event, look in added:
        events.unregister(event, look)


class Requests:
    """The requests of a client in order, as (operation, key)."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str]] = []

    def note(self, params: dict[str, Any], model: Any, **_: object) -> None:
        self.made.append((model.name, params.get("Key", "")))

    def keys(self, operation: str) -> list[str]:
        return [key for name, key in self.made if name == operation]

    def downloads(self) -> list[str]:
        """What was downloaded, apart from manifests."""
        return [key for key in self.keys("GetObject") if posixpath.basename(key) != MANIFEST]


@pytest.fixture
def requests(on: Hook) -> Requests:
    """The requests that storage has sent to the server so far."""
    it = Requests()
    on("provide-client-params.s3", it.note)
    return it


# Addresses


@pytest.mark.parametrize(
    ("uri", "remote"),
    [
        ("s3://bucket/key", True),
        ("runs/tiny", False),
        ("/runs/tiny", False),
        ("file:///runs/tiny", False),
        ("embedded:lvlm", False),
        ("llava-hf/llava-1.5-7b-hf", False),
    ],
)
def test_an_address_is_remote_by_its_scheme(uri: str, remote: bool) -> None:
    assert storage.is_remote(uri) is remote


@pytest.mark.parametrize(
    "uri",
    [
        "gs://bucket/key",
        "minio://bucket/key",
        "https://user:hidden@host/key?X-Amz-Signature=hidden",
        "S3://bucket/key",
        "s3:/bucket/key",
    ],
)
def test_another_scheme_is_refused_with_what_to_write_and_no_secret(uri: str) -> None:
    with pytest.raises(UserError, match=r"s3://BUCKET/KEY.*AWS_ENDPOINT_URL") as caught:
        storage.is_remote(uri)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["s3://", "s3:///key", "s3://b/../etc", "s3://bucket/a//b", "s3://k:hidden@bucket/a"]
)
def test_an_address_that_is_none_is_refused(uri: str, no_aws: None) -> None:
    with pytest.raises(UserError, match="is not a valid address in a bucket") as caught:
        storage.fetch(uri)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "name", "joined"),
    [
        ("s3://bucket/run/tune", "adapter", "s3://bucket/run/tune/adapter"),
        ("s3://bucket/run/tune/", "../dpo/k/adapter", "s3://bucket/run/dpo/k/adapter"),
        ("s3://bucket/run", "..", "s3://bucket"),
        ("s3://bucket", "run", "s3://bucket/run"),
        ("runs/tiny/tune", "../dpo/adapter", "runs/tiny/dpo/adapter"),
        ("/runs", "./adapter/", "/runs/adapter"),
        ("file:///runs/a%20b", "adapter", "/runs/a b/adapter"),
    ],
)
def test_a_reference_is_relative_to_its_folder(uri: str, name: str, joined: str) -> None:
    assert storage.join(uri, name) == joined


@pytest.mark.parametrize("name", ["/adapter", "s3://other/adapter", "file:///adapter"])
@pytest.mark.parametrize("uri", ["s3://bucket/run", "runs/tiny"])
def test_an_absolute_reference_is_refused(uri: str, name: str) -> None:
    with pytest.raises(UserError, match="is not relative to"):
        storage.join(uri, name)


SEGMENTS = st.lists(st.sampled_from(["a", "b c", "..", ".", "", "s3:", "...", "~"]), max_size=8)


@given(SEGMENTS, SEGMENTS)
def test_no_reference_leaves_its_bucket(base: list[str], name: list[str]) -> None:
    key = "/".join(part for part in base if part not in ("", ".", ".."))
    try:
        joined = storage.join(f"s3://bucket/{key}", "/".join(name))
    except UserError:
        return
    assert joined == "s3://bucket" or joined.startswith("s3://bucket/")
    assert not {"", ".", ".."} & set(joined.removeprefix("s3://").split("/"))
    # Where it does not leave the bucket, it means what it means for files.
    assert joined == "s3:/" + posixpath.normpath(posixpath.join("/bucket", key, "/".join(name)))


@given(SEGMENTS.filter(lambda parts: not {"", ".", ".."} & set(parts)))
def test_a_reference_from_one_folder_to_another_is_resolved_to_it(parts: list[str]) -> None:
    target = posixpath.join("/bucket", *parts)
    name = posixpath.relpath(target, "/bucket/run/tune")
    assert storage.join("s3://bucket/run/tune", name) == "s3:/" + target


def test_the_cache_is_where_the_environment_says(
    no_aws: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SRCCORE_CACHE", "/cache")
    assert storage.local_path("s3://bucket/run/tune/") == Path("/cache/s3/aws/bucket/run/tune")
    # Another store may have a bucket of the same name.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://key:secret@minio.example:9000/")
    assert storage.local_path("s3://bucket/a") == Path("/cache/s3/minio.example_9000/bucket/a")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("SRCCORE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert storage.local_path("s3://bucket") == Path("/xdg/srccore/s3/aws/bucket")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.local_path("s3://bucket") == tmp_path / ".cache/srccore/s3/aws/bucket"
    assert storage.local_path("runs/tiny") == Path("runs/tiny")


def test_importing_storage_does_not_import_boto3() -> None:
    code = "import sys, srccore.storage; sys.exit('boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Local folders


def test_a_local_folder_is_fetched_where_it_lies(tmp_path: Path) -> None:
    folder = write(tmp_path / "tune", FILES)
    assert storage.fetch(str(folder)) == folder
    assert storage.fetch(f"file://{folder}") == folder
    assert [file.path for file in storage.listing(str(folder))] == sorted(FILES)
    assert storage.read_text(str(folder / "policy.json")) == '{"name": "ä"}'
    assert storage.listing(str(folder / "stage.json")) == [storage.StoredFile("stage.json", 2, "")]


@pytest.mark.parametrize("ask", [storage.fetch, storage.listing, storage.read_text])
def test_a_missing_local_folder_is_told(ask: Callable[[str], object], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        assert not storage.exists(str(tmp_path / name))
        with pytest.raises(UserError, match="Nothing is stored at"):
            ask(str(tmp_path / name))


def test_a_local_folder_is_published_by_copying(tmp_path: Path) -> None:
    folder = write(tmp_path / "tune", FILES | {JOURNAL: b"{}", "part.tmp": b"half"})
    storage.publish(folder, str(tmp_path / "kept/tune"))
    assert contents(tmp_path / "kept/tune") == FILES
    assert (tmp_path / "kept/tune" / MANIFEST).stat().st_mtime_ns >= max(
        path.stat().st_mtime_ns for path in (tmp_path / "kept/tune").rglob("*") if path.is_file()
    )


def test_publishing_a_folder_to_itself_does_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "tune", FILES)
    before = {path: path.stat() for path in folder.rglob("*")}
    storage.publish(folder, f"file://{tmp_path}/x/../tune")
    assert {path: path.stat() for path in folder.rglob("*")} == before


@pytest.mark.parametrize("uri", ["out", "s3://bucket/out"])
def test_a_folder_of_nothing_is_not_published(tmp_path: Path, uri: str) -> None:
    for folder in (tmp_path / "none", write(tmp_path / "tune", {JOURNAL: b"{}"})):
        with pytest.raises(UserError, match="nothing to publish"):
            storage.publish(folder, uri)


def test_an_unwritable_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"Cannot write to .*file/out: "):
        storage.publish(write(tmp_path / "tune", FILES), str(tmp_path / "file/out"))


# Buckets: there and back


def test_a_folder_comes_back_byte_for_byte(s3: S3Server, tmp_path: Path) -> None:
    uri = f"{s3.uri}/run/tune"
    storage.publish(write(tmp_path / "tune", FILES), uri)
    assert storage.fetch(uri) == storage.local_path(uri)
    assert contents(storage.local_path(uri)) == FILES
    assert storage.fetch(s3.uri + "/").name == s3.bucket


def test_a_large_file_travels_in_parts(s3: S3Server, tmp_path: Path, requests: Requests) -> None:
    # Parts have 8 MiB: two full ones and one more byte.
    data = os.urandom(16 * 2**20 + 1)
    storage.publish(write(tmp_path / "tune", {"model.safetensors": data}), f"{s3.uri}/tune")
    assert len(requests.keys("UploadPart")) == 3
    assert storage.fetch(f"{s3.uri}/tune/model.safetensors").read_bytes() == data
    assert len(requests.downloads()) == 3


def test_what_is_there_is_told_and_what_is_not(s3: S3Server) -> None:
    s3.put("run/tune/adapter/weights", b"12345")
    s3.put("marked/", b"")
    s3.put("run/tune-2/weights")
    for name in ("", "run", "run/tune", "run/tune/", "run/tune/adapter/weights"):
        assert storage.exists(f"{s3.uri}/{name}".rstrip("/"))
    for name in ("ru", "run/tun", "run/tune/adapter/weight", "marked"):
        assert not storage.exists(f"{s3.uri}/{name}")
        with pytest.raises(UserError, match=f"Nothing is stored at {s3.uri}/{name}"):
            storage.fetch(f"{s3.uri}/{name}")
    (file,) = storage.listing(f"{s3.uri}/run/tune")
    assert (file.path, file.size) == ("adapter/weights", 5)
    assert storage.listing(f"{s3.uri}/run/tune/adapter/weights") == [
        storage.StoredFile("weights", 5, file.etag)
    ]


def test_a_small_file_is_read_without_a_trace(s3: S3Server, tmp_path: Path) -> None:
    s3.put("policy.json", FILES["policy.json"])
    s3.put("weights", b"\xff\xfe")
    assert storage.read_text(f"{s3.uri}/policy.json") == '{"name": "ä"}'
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match="is not UTF-8 text"):
        storage.read_text(f"{s3.uri}/weights")
    for missing in (f"{s3.uri}/none", s3.uri):
        with pytest.raises(UserError, match="Nothing is stored"):
            storage.read_text(missing)


def test_a_fingerprint_knows_names_and_contents(s3: S3Server) -> None:
    s3.put("model/weights", b"12345")
    first = storage.fingerprint(f"{s3.uri}/model")
    assert storage.fingerprint(f"{s3.uri}/model") == first
    s3.put("model/weights", b"54321")
    second = storage.fingerprint(f"{s3.uri}/model")
    s3.put("model/weights-2", b"")
    assert len({first, second, storage.fingerprint(f"{s3.uri}/model")}) == 3


# Buckets: publishing


def test_of_two_writers_of_a_file_the_first_one_wins(s3: S3Server) -> None:
    assert storage.create(f"{s3.uri}/parts/1", b"first")
    assert not storage.create(f"{s3.uri}/parts/1", b"second")
    assert s3.get("parts/1") == b"first"


@contextlib.contextmanager
def answering(
    answer: Callable[[BaseHTTPRequestHandler, bytes], tuple[int, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    """A store that answers writes with a status and a body, as a function says."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            status, body = answer(self, self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            monkeypatch.setenv(name, value)
        yield
        server.shutdown()


@pytest.mark.parametrize("status", [400, 501])
def test_a_store_without_conditional_writes_gets_unconditional_ones(
    status: int, no_aws: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[tuple[str, bytes]] = []

    def answer(request: BaseHTTPRequestHandler, data: bytes) -> tuple[int, bytes]:
        if request.headers["If-None-Match"] is not None:
            return status, b"<Error><Code>NotImplemented</Code></Error>"
        stored.append((request.path, data))
        return 200, b""

    with answering(answer, monkeypatch):
        assert storage.create("s3://bucket/parts/1", b"data")
    assert stored == [("/bucket/parts/1", b"data")]


def test_a_conflict_of_two_conditional_writes_is_tried_again(
    no_aws: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = [409, 409, 412, 200]

    def answer(_request: BaseHTTPRequestHandler, _data: bytes) -> tuple[int, bytes]:
        status = statuses.pop(0)
        return status, b"" if status == 200 else b"<Error><Code>Conditional</Code></Error>"

    with answering(answer, monkeypatch):
        assert not storage.create("s3://bucket/finished.json", b"data")
        assert storage.create("s3://bucket/finished.json", b"data")


def test_the_manifest_is_uploaded_last_and_the_journal_not_at_all(
    s3: S3Server, tmp_path: Path, on: Hook
) -> None:
    stored_before: list[list[str]] = []

    def look(params: dict[str, Any], **_: object) -> None:
        if params["Key"] == f"tune/{MANIFEST}":
            stored_before.append(s3.keys())

    on("provide-client-params.s3.PutObject", look)
    folder = write(tmp_path / "tune", FILES | {JOURNAL: b"{}", "adapter/part.tmp": b"half"})
    storage.publish(folder, f"{s3.uri}/tune")
    stored = sorted(f"tune/{name}" for name in FILES)
    assert sorted(s3.keys()) == stored
    assert [sorted(keys) for keys in stored_before] == [
        [key for key in stored if key != f"tune/{MANIFEST}"]
    ]


def test_what_was_published_from_the_cache_is_not_downloaded(
    s3: S3Server, requests: Requests
) -> None:
    uri = f"{s3.uri}/run/tune"
    storage.publish(write(storage.local_path(uri), FILES), uri)
    requests.made.clear()
    storage.fetch(uri)
    assert requests.made == [("ListObjectsV2", "")]


# Buckets: fetching


def test_a_second_fetch_downloads_nothing(s3: S3Server, tmp_path: Path, requests: Requests) -> None:
    storage.publish(write(tmp_path / "tune", FILES), f"{s3.uri}/run/tune")
    requests.made.clear()
    storage.fetch(f"{s3.uri}/run/tune")
    data = sorted(f"run/tune/{name}" for name in FILES if name != MANIFEST)
    assert sorted(requests.downloads()) == data
    assert requests.keys("GetObject")[-1] == f"run/tune/{MANIFEST}"
    requests.made.clear()
    storage.fetch(f"{s3.uri}/run/tune")
    assert requests.made == [("ListObjectsV2", "")]
    # A part of it, or more than it, is not downloaded again either.
    storage.fetch(f"{s3.uri}/run/tune/adapter")
    storage.fetch(s3.uri)
    assert len(requests.keys("ListObjectsV2")) == 3
    assert requests.downloads() == []


def test_a_changed_object_is_fetched_again_and_a_removed_one_goes(
    s3: S3Server, requests: Requests
) -> None:
    for name in ("changed", "kept", "removed", "deep/removed"):
        s3.put(f"model/{name}", b"before")
    folder = storage.fetch(f"{s3.uri}/model")
    s3.put("model/changed", b"behind")
    s3.delete("model/removed")
    s3.delete("model/deep/removed")
    write(folder, {"mine": b"never fetched"})
    requests.made.clear()
    storage.fetch(f"{s3.uri}/model")
    assert requests.downloads() == ["model/changed"]
    # What was not fetched may be the work of another process.
    assert contents(folder) == {
        "changed": b"behind",
        "kept": b"before",
        "mine": b"never fetched",
    }


def test_a_cached_file_that_somebody_touched_is_fetched_again(s3: S3Server) -> None:
    s3.put("model/weights", b"before")
    folder = storage.fetch(f"{s3.uri}/model")
    (folder / "weights").write_bytes(b"broken")
    storage.fetch(f"{s3.uri}/model")
    assert contents(folder) == {"weights": b"before"}


def test_a_folder_and_a_file_may_change_places(s3: S3Server) -> None:
    s3.put("model/a/b", b"1")
    folder = storage.fetch(f"{s3.uri}/model")
    s3.delete("model/a/b")
    s3.delete("model/a/")
    s3.put("model/a", b"2")
    storage.fetch(f"{s3.uri}/model")
    assert contents(folder) == {"a": b"2"}
    s3.delete("model/a")
    s3.put("model/a/b", b"1")
    storage.fetch(f"{s3.uri}/model")
    assert contents(folder) == {"a/b": b"1"}


def test_an_object_that_changes_while_it_is_fetched_is_not_taken(s3: S3Server, on: Hook) -> None:
    s3.put("model/weights", b"before")
    folder = storage.fetch(f"{s3.uri}/model")
    s3.put("model/weights", b"behind")
    on("provide-client-params.s3.GetObject", lambda **_: s3.put("model/weights", b"between"))
    with pytest.raises(Exception, match="did not match expected ETag"):
        storage.fetch(f"{s3.uri}/model")
    assert contents(folder) == {"weights": b"before"}


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = sys.dont_write_bytecode
    # Python would write cut bytecode, and every later process would fail to read it.
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.dont_write_bytecode = before


def test_a_download_that_breaks_off_leaves_no_half_file(s3: S3Server, tmp_path: Path) -> None:
    s3.put("model/config.json", b"{}")
    s3.put("model/weights", bytes(2**20))
    with (
        files_no_larger_than(2**19),
        pytest.raises(UserError, match=r"Cannot write to .*: File too large\..*SRCCORE_CACHE"),
    ):
        storage.fetch(f"{s3.uri}/model")
    assert not (storage.local_path(f"{s3.uri}/model") / "weights").exists()
    assert list((tmp_path / "cache/tmp").iterdir()) == []
    assert (storage.fetch(f"{s3.uri}/model") / "weights").stat().st_size == 2**20


def test_a_cache_that_cannot_be_written_is_told(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    s3.put("model/weights")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SRCCORE_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(UserError, match=r"Cannot write to .*file/cache: .*SRCCORE_CACHE"):
        storage.fetch(f"{s3.uri}/model")


def test_downloads_that_were_killed_long_ago_are_cleared_away(s3: S3Server, tmp_path: Path) -> None:
    for name, age in (("old", storage.ABANDONED + 60), ("young", 60)):
        left = write(tmp_path / "cache/tmp" / name, {"0": b"half"})
        os.utime(left, (time.time() - age,) * 2)
    s3.put("model/weights")
    storage.fetch(f"{s3.uri}/model")
    assert [left.name for left in (tmp_path / "cache/tmp").iterdir()] == ["young"]


# Buckets: what a stage wrote


def stage(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a finished stage."""
    outputs = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return {"stage.json": b"{}", MANIFEST: json.dumps({"outputs": outputs}).encode(), **files}


WRITTEN = stage({"policy.json": b"{}", "adapter/weights": b"weights"})


def spoil(path: Path, data: bytes) -> None:
    """Changes a file as a fault of the disk does, which no clock notices."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("part", ["", "/adapter", "/adapter/weights"])
def test_what_a_stage_wrote_is_not_read_once_it_was_altered(s3: S3Server, part: str) -> None:
    for name, data in WRITTEN.items():
        s3.put(f"tune/{name}", data)
    assert storage.fetch(f"{s3.uri}/tune{part}").exists()
    s3.put("tune/adapter/weights", b"altered")
    with pytest.raises(UserError, match="tune/adapter/weights is missing or is not what its stage"):
        storage.fetch(f"{s3.uri}/tune{part}")
    s3.put("tune/adapter/weights", b"weights")
    assert contents(storage.fetch(f"{s3.uri}/tune")) == WRITTEN


def test_a_text_that_was_altered_is_not_read(s3: S3Server) -> None:
    for name, data in WRITTEN.items():
        s3.put(f"tune/{name}", data)
    assert storage.read_text(f"{s3.uri}/tune/policy.json") == "{}"
    s3.put("tune/policy.json", b"[]")
    with pytest.raises(UserError, match=r"tune/policy\.json is missing or is not what its stage"):
        storage.read_text(f"{s3.uri}/tune/policy.json")


@pytest.mark.parametrize("part", ["", "/adapter"])
def test_a_stage_without_a_file_that_its_manifest_lists_is_refused(s3: S3Server, part: str) -> None:
    for name, data in WRITTEN.items():
        s3.put(f"tune/{name}", data)
    s3.put("tune/adapter/another")
    s3.delete("tune/adapter/weights")
    with pytest.raises(UserError, match="tune/adapter/weights is missing"):
        storage.fetch(f"{s3.uri}/tune{part}")


def test_altered_bytes_of_equal_size_and_time_do_not_stay_in_the_cache(
    s3: S3Server, tmp_path: Path
) -> None:
    storage.publish(write(tmp_path / "tune", WRITTEN), f"{s3.uri}/tune")
    place = storage.fetch(f"{s3.uri}/tune") / "adapter/weights"
    # Another process has another memory of which file has which bytes.
    code = f"from srccore.storage import fetch; fetch('{s3.uri}/tune')"
    spoil(place, b"altered")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert place.read_bytes() == b"weights"


@contextlib.contextmanager
def spoiling(endpoint: str, key: str, times: int) -> Iterator[str]:
    """A proxy that changes the first answers with an object, and tells nobody."""
    left = [times]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = http.client.HTTPConnection(urlsplit(endpoint).netloc)
            asked.request("GET", self.path, headers=dict(self.headers))
            answer = asked.getresponse()
            body = answer.read()
            if self.path.endswith(key) and left[0]:
                left[0] -= 1
                body = bytes(len(body))
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            asked.close()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# Through a proxy, versitygw would notice that the request was signed for another host.
@pytest.mark.parametrize("s3", ["moto"], indirect=True)
@pytest.mark.parametrize(("times", "arrives"), [(2, True), (5, False)])
def test_bytes_that_change_on_their_way_are_asked_for_again(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, arrives: bool
) -> None:
    storage.publish(write(tmp_path / "tune", WRITTEN), f"{s3.uri}/tune")
    with spoiling(s3.endpoint, "adapter/weights", times) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        if arrives:
            assert contents(storage.fetch(f"{s3.uri}/tune")) == WRITTEN
            return
        with pytest.raises(UserError, match="adapter/weights is missing or is not what"):
            storage.fetch(f"{s3.uri}/tune")
    assert not (storage.local_path(f"{s3.uri}/tune") / "adapter/weights").exists()


PART = (10, 20, hashlib.sha256(bytes(range(10, 30))).hexdigest())
"""Start, length and hash of a part of the bytes from 0 to 255."""


def test_a_part_is_asked_for_by_its_range_and_once(s3: S3Server, on: Hook) -> None:
    s3.put("data/train.parquet", bytes(range(256)))
    ranges: list[str] = []
    on("provide-client-params.s3.GetObject", lambda params, **_: ranges.append(params["Range"]))
    for _ in range(2):
        assert storage.fetch_part(f"{s3.uri}/data/train.parquet", *PART) == bytes(range(10, 30))
    assert ranges == ["bytes=10-29"]
    assert not storage.local_path(f"{s3.uri}/data/train.parquet").exists()


def test_a_part_that_was_damaged_in_the_cache_is_read_again(s3: S3Server, tmp_path: Path) -> None:
    s3.put("train.parquet", bytes(range(256)))
    storage.fetch_part(f"{s3.uri}/train.parquet", *PART)
    (kept,) = (path for path in (tmp_path / "cache").rglob("*") if path.name == PART[2])
    kept.write_bytes(bytes(5))
    assert storage.fetch_part(f"{s3.uri}/train.parquet", *PART) == bytes(range(10, 30))
    assert kept.read_bytes() == bytes(range(10, 30))


def test_a_part_that_cannot_be_kept_is_returned_and_that_is_said_once(
    s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    s3.put("train.parquet", bytes(range(256)))
    with files_no_larger_than(19):
        for _ in range(2):
            assert storage.fetch_part(f"{s3.uri}/train.parquet", *PART) == bytes(range(10, 30))
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"Parts of files cannot be kept in .*/cache: File too large\. They are", line)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_part_is_read_without_a_cache(s3: S3Server, tmp_path: Path) -> None:
    s3.put("train.parquet", bytes(range(256)))
    (tmp_path / "cache").write_text("in the way")
    assert storage.fetch_part(f"{s3.uri}/train.parquet", *PART) == bytes(range(10, 30))


def test_a_part_that_a_killed_process_was_writing_is_cleared_away(
    s3: S3Server, tmp_path: Path
) -> None:
    left = write(tmp_path / "cache/tmp/old", {"part": b"half"})
    os.utime(left, (time.time() - storage.ABANDONED - 60,) * 2)
    s3.put("train.parquet", bytes(range(256)))
    storage.fetch_part(f"{s3.uri}/train.parquet", *PART)
    assert list(contents(tmp_path / "cache")) == [f"parts/{PART[2][:2]}/{PART[2]}"]


def test_a_part_of_a_changed_file_is_told_by_its_hash_and_not_kept(
    s3: S3Server, tmp_path: Path
) -> None:
    for data in (bytes(256), bytes(15), bytes(10)):
        s3.put("train.parquet", data)
        assert storage.fetch_part(f"{s3.uri}/train.parquet", *PART) is None
    assert not (tmp_path / "cache" / "parts").exists()
    s3.delete("train.parquet")
    with pytest.raises(UserError, match="Nothing is stored at"):
        storage.fetch_part(f"{s3.uri}/train.parquet", *PART)


class Failing(ThreadingHTTPServer):
    """A store that fails in one way for each of its `faults`, and then has bytes from 10 to 29."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Failing.Handler)
        self.faults: list[str] = []
        self.served = 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert isinstance(self.server, Failing)
            fault = self.server.faults.pop() if self.server.faults else ""
            self.server.served += 1
            # The connection breaks before the answer, or in its middle.
            if fault == "no answer":
                return
            body = ANSWER.format(code=fault).encode() if fault.isalpha() else bytes(range(10, 30))
            self.send_response(503 if fault.isalpha() else 206)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:10] if fault == "half an answer" else body)

        def log_message(self, *_: object) -> None:
            pass


@pytest.fixture
def failing(keys: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Failing]:
    with Failing() as it:
        thread = threading.Thread(target=it.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{it.server_port}")
        try:
            yield it
        finally:
            it.shutdown()
            thread.join()


FAULTS = {
    "SlowDown": "is overloaded or has a fault (s3://bucket/train.parquet, SlowDown)",
    "InternalError": "is overloaded or has a fault (s3://bucket/train.parquet, InternalError)",
    "no answer": "The connection to the store broke or timed out (s3://bucket/train.parquet)",
    "half an answer": "The connection to the store broke or timed out (s3://bucket/train.parquet)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_part_is_read_again_while_the_store_fails(
    failing: Failing,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    monkeypatch.setattr(storage, "PAUSES", (0.01,) * 6)
    failing.faults = [fault] * 6
    assert storage.fetch_part("s3://bucket/train.parquet", *PART) == bytes(range(10, 30))
    (line,) = capsys.readouterr().err.splitlines()
    assert FAULTS[fault] in line and "Trying again for" in line
    assert failing.served == 7


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_fails_for_long_is_reported(
    failing: Failing, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(storage, "PAUSES", (0.01,) * 2)
    failing.faults = [fault] * 9
    with pytest.raises(UserError, match=re.escape(FAULTS[fault])):
        storage.fetch_part("s3://bucket/train.parquet", *PART)
    assert failing.served == 3


def test_threads_that_wait_for_the_store_say_so_once(
    failing: Failing, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    together = threading.Barrier(4, timeout=30)
    monkeypatch.setattr(storage, "PAUSES", (0.01,))
    monkeypatch.setattr(storage.time, "sleep", lambda _: together.wait())
    failing.faults = ["SlowDown"] * 4
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda n: storage.fetch_part(f"s3://bucket/{n}", *PART), range(4))
        assert list(found) == [bytes(range(10, 30))] * 4
    assert capsys.readouterr().err.count("Trying again") == 1


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
@pytest.mark.parametrize(
    "ask",
    [
        storage.exists,
        storage.listing,
        storage.fetch,
        storage.remove,
        lambda uri: storage.read_text(f"{uri}/weights"),
        lambda uri: storage.drop_stale(f"{uri}/weights"),
        lambda uri: storage.publish(storage.local_path(uri), uri),
    ],
)
def test_a_store_that_is_down_is_waited_for(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, ask: Callable[[str], object]
) -> None:
    s3.put("model/weights")
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    write(storage.fetch(f"{s3.uri}/model"), {"weights": b"changed"})
    server.stop()
    # A new client: a connection that was kept open may still be answered.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    monkeypatch.setattr(storage, "PAUSES", (0.01,))
    monkeypatch.setattr(storage.time, "sleep", lambda _: server.start())
    try:
        ask(f"{s3.uri}/model")
    finally:
        server.stop()


@pytest.mark.parametrize("status", [403, 404, 400, 501])
def test_what_does_not_pass_is_asked_for_once(
    keys: None, monkeypatch: pytest.MonkeyPatch, scripted: Scripted, status: int
) -> None:
    monkeypatch.setattr(storage, "PAUSES", (600,))
    monkeypatch.setenv("AWS_ENDPOINT_URL", scripted.url)
    scripted.status, scripted.body = status, ANSWER.format(code="AccessDenied")
    with pytest.raises((UserError, ClientError)):
        storage.fetch_part("s3://bucket/train.parquet", *PART)


def test_a_store_is_waited_for_five_minutes() -> None:
    assert sum(storage.PAUSES) == 300


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_a_forked_process_gets_a_client_of_its_own(s3: S3Server) -> None:
    s3.put("train.parquet", bytes(range(256)))
    # A client with an open connection, which two processes could not share.
    assert storage.exists(f"{s3.uri}/train.parquet")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found, client = pool.apply(_part_and_client, (f"{s3.uri}/train.parquet",))
    assert found == bytes(range(10, 30))
    assert client != id(storage._client())


def _part_and_client(uri: str) -> tuple[bytes | None, int]:
    return storage.fetch_part(uri, *PART), id(storage._client())


def test_a_path_in_the_cache_leads_to_its_address(tmp_path: Path, no_aws: None) -> None:
    path = storage.local_path("s3://bucket/data/train.parquet")
    (tmp_path / "link").symlink_to(path)
    for each in (path, tmp_path / "link"):
        assert storage.address_of(each) == "s3://bucket/data/train.parquet"
    with pytest.raises(ValueError, match="is not in the subpath"):
        storage.address_of(tmp_path / "train.parquet")


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_two_processes_may_fetch_the_same_at_once(s3: S3Server, requests: Requests) -> None:
    files = {f"shard-{number}": os.urandom(2**16) for number in range(20)}
    for name, data in files.items():
        s3.put(f"model/{name}", data)
    code = f"from srccore.storage import fetch; fetch('{s3.uri}/model')"

    def run(_: int) -> int:
        return subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode

    with ThreadPoolExecutor() as both:
        assert list(both.map(run, range(2))) == [0, 0]
    assert contents(storage.local_path(f"{s3.uri}/model")) == files
    storage.fetch(f"{s3.uri}/model")
    assert requests.downloads() == []


def test_of_two_that_fetch_the_same_at_once_one_downloads_it(
    s3: S3Server, requests: Requests, on: Hook
) -> None:
    for number in range(3):
        s3.put(f"model/shard-{number}")
    deadline = time.monotonic() + 30

    def wait_until_both_have_looked(**_: object) -> None:
        while len(requests.keys("ListObjectsV2")) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)

    on("provide-client-params.s3.GetObject", wait_until_both_have_looked)
    with ThreadPoolExecutor() as both:
        found = list(both.map(storage.fetch, [f"{s3.uri}/model"] * 2))
    assert found == [storage.local_path(f"{s3.uri}/model")] * 2
    assert sorted(requests.downloads()) == [f"model/shard-{n}" for n in range(3)]


# versitygw does not accept such keys.
@pytest.mark.parametrize("s3", ["moto"], indirect=True)
@pytest.mark.parametrize(
    "key",
    ["../evil", "a/../../../../evil", "/evil", "a//evil", "./evil", "a/..", "nul\0", "fine/below"],
)
def test_a_key_that_is_no_file_below_the_folder_is_refused(
    s3: S3Server, tmp_path: Path, key: str
) -> None:
    s3.put("model/fine")
    s3.put(f"model/{key}")
    for ask in (storage.fetch, storage.listing, storage.fingerprint):
        with pytest.raises(UserError, match=r"The object .* cannot be a file in a local folder"):
            ask(f"{s3.uri}/model")
    assert not (tmp_path / "cache").exists()


# Removing


@pytest.mark.parametrize("name", ["tune", "tune/adapter", "tune/policy.json", "none"])
def test_what_is_removed_is_gone_and_the_rest_stays(
    s3: S3Server, tmp_path: Path, name: str
) -> None:
    # A name that starts with another name is a different one.
    files = {
        f"{folder}/{file}": data for folder in ("tune", "tune-2") for file, data in FILES.items()
    }
    stays = {file for file in files if file != name and not file.startswith(f"{name}/")}
    write(tmp_path / "local", files)
    storage.publish(tmp_path / "local", s3.uri)
    for _ in range(2):
        storage.remove(f"{s3.uri}/{name}")
        storage.remove(str(tmp_path / "local" / name))
        assert set(s3.keys()) == stays
        assert contents(tmp_path / "local").keys() == stays


def test_manifests_are_removed_first(s3: S3Server, requests: Requests) -> None:
    for name in ("a", f"one/{MANIFEST}", "one/weights", f"two/{MANIFEST}"):
        s3.put(f"checkpoint/{name}")
    storage.remove(f"{s3.uri}/checkpoint")
    assert set(requests.keys("DeleteObject")[:2]) == {
        f"checkpoint/one/{MANIFEST}",
        f"checkpoint/two/{MANIFEST}",
    }


def test_a_whole_bucket_is_not_removed(s3: S3Server) -> None:
    s3.put("model/weights")
    with pytest.raises(UserError, match="is a whole bucket"):
        storage.remove(f"{s3.uri}/")
    assert s3.keys() == ["model/weights"]


# Faults

ASKS: list[Callable[[str], object]] = [
    storage.exists,
    storage.fetch,
    storage.listing,
    storage.read_text,
]


def refused(ask: Callable[[str], object], uri: str, match: str) -> str:
    with pytest.raises(UserError, match=match) as caught:
        ask(uri)
    assert uri in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "folder", FILES)


def test_a_missing_bucket_is_told(s3: S3Server, folder: Path) -> None:
    for ask in [*ASKS, storage.remove, lambda uri: storage.publish(folder, uri)]:
        message = refused(ask, "s3://no-such-bucket/key", "There is no bucket no-such-bucket")
        assert s3.endpoint in message


@pytest.mark.parametrize("s3", ["versitygw"], indirect=True)
@pytest.mark.parametrize(
    ("variable", "code"),
    [
        ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId"),
        ("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"),
    ],
)
def test_a_wrong_key_is_told_and_not_shown(
    s3: S3Server, folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str, code: str
) -> None:
    monkeypatch.setenv(variable, "not-to-be-seen")
    for ask in [*ASKS, lambda uri: storage.publish(folder, uri)]:
        message = refused(ask, f"{s3.uri}/key", f"rejected the access key.*{code}.*Check AWS_")
        assert "not-to-be-seen" not in message and s3.secret not in message


@pytest.mark.parametrize("s3", ["versitygw"], indirect=True)
@pytest.mark.parametrize(
    ("rights", "ask", "match"),
    [
        ([], storage.exists, "not allowed to list .*s3:ListBucket"),
        ([], storage.read_text, "not allowed to read .*s3:GetObject"),
        (["s3:GetObject"], storage.fetch, "not allowed to list .*s3:ListBucket"),
        (["s3:ListBucket"], storage.fetch, "not allowed to read .*s3:GetObject"),
        (
            ["s3:ListBucket", "s3:GetObject"],
            lambda uri: storage.publish(storage.fetch(uri), uri),
            "not allowed to write .*s3:PutObject",
        ),
        (
            ["s3:ListBucket", "s3:GetObject", "s3:PutObject"],
            storage.remove,
            "not allowed to delete .*s3:DeleteObject",
        ),
    ],
)
def test_a_missing_permission_is_named(
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    rights: list[str],
    ask: Callable[[str], object],
    match: str,
) -> None:
    s3.put("model/weights")
    user = s3.with_user_who_may(*rights)
    for name, value in user.environment.items():
        monkeypatch.setenv(name, value)
    refused(ask, f"{s3.uri}/model", match)


@pytest.mark.parametrize("s3", ["versitygw"], indirect=True)
def test_a_region_that_the_store_corrects_is_no_fault(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put("key")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert storage.exists(f"{s3.uri}/key")


ANSWER = """<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>{code}</Code><Message>hidden</Message><Region>eu-central-1</Region></Error>"""
STS_ANSWER = """<ErrorResponse><Error><Code>{code}</Code><Message>hidden</Message></Error>
</ErrorResponse>"""


class Scripted(ThreadingHTTPServer):
    """Answers every request in the same way, with responses that no server here can produce."""

    status, body = 200, ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            assert isinstance(self.server, Scripted)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(self.server.status)
            self.send_header("Content-Length", str(len(self.server.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(self.server.body.encode())

        def log_message(self, *args: object) -> None:
            pass


for method in ("GET", "HEAD", "POST"):
    setattr(Scripted.Handler, f"do_{method}", Scripted.Handler.answer)


@pytest.fixture(scope="module")
def scripted() -> Iterator[Scripted]:
    with Scripted(("127.0.0.1", 0), Scripted.Handler) as it:
        thread = threading.Thread(target=it.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield it
        finally:
            it.shutdown()
            thread.join()


@pytest.fixture
def keys(no_aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.mark.parametrize(
    ("status", "code", "match"),
    [
        (400, "ExpiredToken", "session token .* has expired .*AWS_SESSION_TOKEN"),
        (400, "InvalidToken", "session token .* is not valid"),
        (301, "PermanentRedirect", "not in the .* region .*AWS_REGION to eu-central-1"),
        (400, "AuthorizationHeaderMalformed", "not in the .* region .*AWS_REGION to eu-central-1"),
        (403, "AccessDenied", "not allowed to list"),
        (403, "AllAccessDisabled", "not allowed to list"),
    ],
)
def test_a_refusal_is_explained(
    keys: None,
    monkeypatch: pytest.MonkeyPatch,
    scripted: Scripted,
    status: int,
    code: str,
    match: str,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", scripted.url)
    scripted.status, scripted.body = status, ANSWER.format(code=code)
    assert "hidden" not in refused(storage.listing, "s3://bucket/key", match)


def test_a_role_that_may_not_be_taken_is_told(
    no_aws: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scripted: Scripted
) -> None:
    (tmp_path / "token").write_text("hidden")
    monkeypatch.setenv("AWS_ENDPOINT_URL", scripted.url)
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/src")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    scripted.status, scripted.body = 403, STS_ANSWER.format(code="AccessDenied")
    message = refused(storage.listing, "s3://bucket/key", "role .* cannot be assumed")
    assert "hidden" not in message


def test_missing_credentials_are_told(no_aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    refused(storage.exists, "s3://bucket/key", "No credentials .*AWS_ACCESS_KEY_ID.*IAM role")


def test_a_missing_profile_is_told(keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    refused(storage.exists, "s3://bucket/key", "no profile nobody")


def test_an_endpoint_that_does_not_answer_is_named(
    keys: None, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:hidden@127.0.0.1:{port}")
    for ask in [*ASKS, lambda uri: storage.publish(folder, uri)]:
        message = refused(ask, "s3://bucket/key", f"http://127.0.0.1:{port} does not respond")
        assert "hidden" not in message


def test_an_endpoint_that_is_no_url_is_told(keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "user:hidden@minio:9000")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL is not a URL") as caught:
        storage.exists("s3://bucket/key")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("bundle", [None, "/no/such/file"])
def test_a_connection_without_trust_is_told(
    keys: None, monkeypatch: pytest.MonkeyPatch, scripted: Scripted, bundle: str | None
) -> None:
    if bundle:
        monkeypatch.setenv("AWS_CA_BUNDLE", bundle)
    # It does not accept TLS.
    monkeypatch.setenv("AWS_ENDPOINT_URL", scripted.url.replace("http:", "https:"))
    refused(
        storage.exists, "s3://bucket/key", "Cannot open a trusted TLS connection .*AWS_CA_BUNDLE"
    )


# The client


def test_a_store_that_is_not_amazons_gets_paths_and_no_new_checksums(
    keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9000")
    config = storage._client().meta.config
    assert config.s3 == {"addressing_style": "path"}
    assert config.request_checksum_calculation == "when_required"
    assert config.response_checksum_validation == "when_required"
    assert storage._client().meta.region_name == "us-east-1"
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert storage._client().meta.region_name == "eu-west-1"
    assert storage._client() is storage._client()


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_amazon_keeps_the_defaults(
    keys: None, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "eu-west-1")
    client = storage._client()
    assert client.meta.endpoint_url == "https://s3.eu-west-1.amazonaws.com"
    assert client.meta.config.request_checksum_calculation == "when_supported"


def test_what_amazon_gets_by_default_does_too(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A new environment, so a new client: the newer checksums, no IfMatch for small files.
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setattr(storage, "_is_amazon", lambda endpoint: True)
    files = FILES | {"model.safetensors": os.urandom(8 * 2**20 + 1)}
    storage.publish(write(tmp_path / "tune", files), f"{s3.uri}/tune")
    assert contents(storage.fetch(f"{s3.uri}/tune")) == files
    assert storage._client().meta.config.request_checksum_calculation == "when_supported"


@pytest.mark.parametrize("name", ["s3://other/key", "/elsewhere/adapter"])
def test_an_absolute_reference_stands_as_it_is(name: str) -> None:
    assert storage.resolve("s3://bucket/folder", name) == name


def test_a_relative_reference_is_joined() -> None:
    assert storage.resolve("s3://bucket/a/b", "../c") == "s3://bucket/a/c"
    assert storage.resolve("/root/a", "../c") == "/root/c"
