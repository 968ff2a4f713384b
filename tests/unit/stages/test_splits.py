"""What a pod fetches of a data set that is in a bucket."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3_server
from PIL import Image
from s3_server import S3Server

from srccore import storage
from srccore.config import DataConfig
from srccore.data import sampling
from srccore.data.dataset import read_samples, write_data
from srccore.data.records import Category, Sample
from srccore.errors import UserError
from srccore.files import MANIFEST
from srccore.stages import inputs, splits

moto, no_aws = s3_server.moto, s3_server.no_aws

COUNT, SIZE = 60, 100_000
SAMPLES = [
    Sample(id=f"s{n}", category=Category.CHART, question=f"Number {n}?", answer="3")
    for n in range(COUNT)
]


def noise() -> bytes:
    """A PNG of `SIZE` bytes: one pixel, and random bytes that every reader skips."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue() + os.urandom(SIZE - file.tell())


IMAGES = [noise() for _ in range(COUNT)]


class Received:
    """How many bytes of objects the client has asked for, and of which; manifests do not count."""

    def __init__(self, server: S3Server) -> None:
        self.server = server
        self.bytes = 0
        self.keys: list[str] = []

    def note(self, params: dict[str, Any], **_: object) -> None:
        if params["Key"].endswith(MANIFEST):
            return
        first, last = params["Range"].removeprefix("bytes=").split("-")
        self.keys.append(params["Key"])
        # The range of a transfer's part may go beyond the end of a small file.
        size = len(self.server.get(params["Key"]))
        self.bytes += min(int(last) + 1, size) - int(first)


@pytest.fixture
def received(no_aws: None, moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Received]:
    bucket = moto.with_new_bucket()
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    events, it = storage._client().meta.events, Received(bucket)
    events.register("provide-client-params.s3.GetObject", it.note)
    yield it
    events.unregister("provide-client-params.s3.GetObject", it.note)


@pytest.fixture
def split(received: Received, tmp_path: Path) -> str:
    """The URI of a split of 6 MB."""
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data" / "train.parquet", zip(SAMPLES, IMAGES, strict=True))
    uri = f"{received.server.uri}/data"
    storage.publish(tmp_path / "data", uri)
    return f"{uri}/train.parquet"


def test_a_stage_that_reads_texts_receives_no_image(split: str, received: Received) -> None:
    path = splits.fetch(split)
    assert read_samples(path) == SAMPLES
    assert list(splits.open_split(path)) == SAMPLES
    assert splits.open_split(path).size("s1") == (1, 1)
    assert received.bytes < COUNT * 400


def test_a_shard_receives_its_own_images_and_each_of_them_once(
    split: str, received: Received
) -> None:
    opened = splits.open_split(splits.fetch(split))
    texts = received.bytes
    shard = sampling.shard(opened, 0, 4)
    for _ in range(2):
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda each: opened.encoded(each.id), shard))
        assert found == [IMAGES[SAMPLES.index(each)] for each in shard]
    assert 0 < len(shard) < COUNT / 2
    assert received.bytes - texts == len(shard) * SIZE


def test_an_image_that_changed_in_the_bucket_is_refused(split: str, received: Received) -> None:
    opened = splits.open_split(splits.fetch(split))
    key = split.removeprefix(f"{received.server.uri}/")
    other = received.server.get(key).replace(IMAGES[7], noise())
    received.server.put(key, other)
    with pytest.raises(UserError, match=r"Sample 's7' .*image differs from its SHA-256"):
        opened.image("s7")
    assert opened.encoded("s8") == IMAGES[8]


def test_a_split_is_identified_alike_whatever_of_it_is_here(
    split: str, received: Received, tmp_path: Path
) -> None:
    here = inputs.content("data", tmp_path / "data" / "train.parquet")
    assert inputs.content("data", splits.fetch(split)) == here
    storage.fetch(split)
    assert inputs.content("data", storage.local_path(split)) == here


def test_a_file_without_an_index_is_fetched_whole(received: Received, tmp_path: Path) -> None:
    rows = [each.model_dump(exclude={"facts"}) | {"image": IMAGES[0]} for each in SAMPLES[:3]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mine.parquet")
    received.server.put("mine.parquet", (tmp_path / "mine.parquet").read_bytes())
    opened = splits.open_split(splits.fetch(f"{received.server.uri}/mine.parquet"))
    assert list(opened) == SAMPLES[:3]
    assert opened.encoded("s2") == IMAGES[0]


def test_a_split_whose_index_was_deleted_in_the_bucket_is_read_as_it_is(
    split: str, received: Received, tmp_path: Path
) -> None:
    splits.fetch(split)
    rows = [each.model_dump(exclude={"facts"}) | {"image": IMAGES[0]} for each in SAMPLES[3:5]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "changed.parquet")
    received.server.put("data/train.parquet", (tmp_path / "changed.parquet").read_bytes())
    received.server.delete("data/train.index.jsonl")
    assert list(splits.open_split(splits.fetch(split))) == SAMPLES[3:5]


def test_a_split_that_was_fetched_before_it_was_written_again_is_read_from_the_bucket(
    split: str, received: Received, tmp_path: Path
) -> None:
    storage.fetch(split)
    write_data(tmp_path / "data" / "train.parquet", zip(SAMPLES[:9], IMAGES[9:], strict=False))
    storage.publish(tmp_path / "data", f"{received.server.uri}/data")
    opened = splits.open_split(splits.fetch(split))
    assert list(opened) == SAMPLES[:9]
    assert opened.encoded("s2") == IMAGES[11]


def test_of_a_split_that_is_here_no_image_is_asked_for(split: str, received: Received) -> None:
    storage.fetch(split)
    received.keys.clear()
    opened = splits.open_split(splits.fetch(split))
    assert opened.encoded("s2") == IMAGES[2]
    assert set(received.keys) == {"data/train.index.jsonl"}


def test_a_split_without_its_parquet_file_says_which_is_missing(split: str, tmp_path: Path) -> None:
    path = tmp_path / "data" / "train.parquet"
    path.unlink()
    opened = splits.open_split(path)
    assert opened.sample("s2") == SAMPLES[2]
    with pytest.raises(UserError, match=rf"{path} is missing; its index is there"):
        opened.encoded("s2")


def test_a_split_in_a_bucket_is_identified_by_its_index_too(split: str, received: Received) -> None:
    config = DataConfig(source=split)
    before = inputs.content("uri", split), inputs.data_source(config)
    index = received.server.get("data/train.index.jsonl")
    received.server.put("data/train.index.jsonl", index.replace(b"Number 3?", b"Number 4?"))
    after = inputs.content("uri", split), inputs.data_source(config)
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_a_source_has_the_texts_of_its_index(split: str, received: Received) -> None:
    config = DataConfig(source=split)
    index = received.server.get("data/train.index.jsonl")
    received.server.put("data/train.index.jsonl", index.replace(b"Number 3?", b"Number 4?"))
    assert inputs.source_samples(config)[3].question == "Number 4?"
    received.server.delete("data/train.index.jsonl")
    assert inputs.source_samples(config)[3].question == "Number 3?"


def test_an_image_is_hashed_once(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    def sha256(data: bytes = b"", **settings: Any) -> Any:
        hashed.append(len(data))
        return real(data, **settings)

    opened = splits.open_split(splits.fetch(split))
    real = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", sha256)
    for _ in range(2):
        opened.encoded("s2")
    storage.fetch(split)
    hashed_before = hashed.count(SIZE)
    opened.encoded("s2")
    assert (hashed_before, hashed.count(SIZE)) == (2, 3)


def test_a_prompt_has_the_hash_of_its_image_as_key(split: str) -> None:
    opened = splits.open_split(splits.fetch(split))
    prompt = splits.prompt(opened, SAMPLES[3])
    assert prompt.key == hashlib.sha256(IMAGES[3]).hexdigest()
    assert (prompt.question, prompt.image().size) == ("Number 3?", (1, 1))
