"""The parts of a journal, in a bucket."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import s3_server
from s3_server import S3Server

from srccore.data.records import Rationale
from srccore.stages import parts
from srccore.stages.journal import Journal
from srccore.stages.parts import Parts

moto, versitygw = s3_server.moto, s3_server.versitygw
no_aws, s3 = s3_server.no_aws, s3_server.s3

KEY = "the hash of all inputs"
RECORDS = [Rationale(sample_id=f"s{number}", rationale=f"R\u2028{number}") for number in range(6)]


def journal(bucket: S3Server, pod: Path, key: str = KEY) -> Journal[Rationale]:
    """The journal of a stage in a pod with that folder."""
    pod.mkdir(exist_ok=True)
    return Journal(pod, Rationale, parts=Parts(f"{bucket.uri}/stage/parts", key))


def published(bucket: S3Server, pod: Path, key: str = KEY) -> list[Rationale]:
    """What another pod, with an empty disk, resumes from."""
    with journal(bucket, pod, key) as it:
        return it.records()


def eventually(is_true: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 60
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(is_true())


def test_another_pod_resumes_from_what_was_published(s3: S3Server, tmp_path: Path) -> None:
    with journal(s3, tmp_path / "first") as first:
        first.append(*RECORDS[:2])
        first.append(RECORDS[2])
    with journal(s3, tmp_path / "second") as second:
        assert second.records() == RECORDS[:3]
        second.append(*RECORDS[3:])
        assert second.records() == RECORDS
    assert published(s3, tmp_path / "third") == RECORDS
    # Each pod adds to what is there: one part each, and none of the third, which did nothing.
    names = [key.rpartition("/")[2] for key in sorted(s3.keys())]
    assert [name[:5] for name in names] == ["00000", "00001"]


def test_a_part_is_published_when_it_has_enough_samples(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "SAMPLES", 2)
    with journal(s3, tmp_path / "first") as first:
        for record in RECORDS[:5]:
            first.append(record)
        # The third part would be full with the sixth sample.
        assert eventually(lambda: len(s3.keys()) == 2)
        assert published(s3, tmp_path / "second") == RECORDS[:4]


def test_a_part_is_published_in_time_even_if_nothing_follows(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "SECONDS", 0.2)
    with journal(s3, tmp_path / "first") as first:
        first.append(RECORDS[0])
        assert eventually(s3.keys)
        assert published(s3, tmp_path / "second") == RECORDS[:1]


def test_an_error_of_the_stage_loses_nothing(s3: S3Server, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), journal(s3, tmp_path / "first") as first:
        first.append(*RECORDS)
        raise ZeroDivisionError
    assert published(s3, tmp_path / "second") == RECORDS


def test_lines_that_a_killed_pod_did_not_publish_follow_on_the_same_disk(
    s3: S3Server, tmp_path: Path
) -> None:
    killed = journal(s3, tmp_path / "disk")
    killed.append(*RECORDS[:2])
    killed.path.write_bytes(killed.path.read_bytes()[:-3])
    with journal(s3, tmp_path / "disk"):
        pass
    assert published(s3, tmp_path / "second") == RECORDS[:1]
    assert published(s3, tmp_path / "disk") == RECORDS[:1]
    assert len(s3.keys()) == 1


def test_two_pods_add_their_parts_side_by_side_and_the_first_record_of_a_thing_counts(
    s3: S3Server, tmp_path: Path
) -> None:
    other = [Rationale(sample_id=record.sample_id, rationale="Another.") for record in RECORDS]
    with journal(s3, tmp_path / "first") as first, journal(s3, tmp_path / "second") as second:
        first.append(*RECORDS[:4])
        second.append(*other[2:])
    assert len(s3.keys()) == 2
    found = published(s3, tmp_path / "third")
    assert sorted(record.sample_id for record in found) == [f"s{number}" for number in range(6)]
    assert found == published(s3, tmp_path / "fourth")
    # Which of the two is first follows from their names.
    assert [found[0] in RECORDS, found[0] in other].count(True) == 1
    assert found in ([*RECORDS[:4], *other[4:]], [*other[2:], *RECORDS[:2]])


@pytest.mark.parametrize("seed", range(5))
def test_nothing_of_two_writers_is_lost_or_counts_twice(
    seed: int, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(parts, "SAMPLES", draw.randint(1, 3))
    names = [f"s{number}" for number in range(6)]
    with journal(s3, tmp_path / "first") as first, journal(s3, tmp_path / "second") as second:
        writers = {"first": first, "second": second}
        todo = [(writer, name) for writer in writers for name in names]
        for writer, name in draw.sample(todo, draw.randint(6, 12)):
            writers[writer].append(Rationale(sample_id=name, rationale=writer))
        done = {record for it in writers.values() for record in it.records()}
    found = published(s3, tmp_path / "third")
    assert sorted(each.sample_id for each in found) == sorted({each.sample_id for each in done})
    assert set(found) <= done
    assert found == published(s3, tmp_path / "fourth")


def test_the_same_lines_are_one_part(s3: S3Server, tmp_path: Path) -> None:
    with journal(s3, tmp_path / "first") as first, journal(s3, tmp_path / "second") as second:
        first.append(*RECORDS)
        second.append(*RECORDS)
    assert len(s3.keys()) == 1
    assert published(s3, tmp_path / "third") == RECORDS


def test_a_part_that_is_damaged_or_of_other_work_is_done_again(
    s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        with journal(s3, tmp_path / str(number)) as it:
            it.append(RECORDS[number])
    damaged = s3.keys()[0]
    s3.put(damaged, s3.get(damaged).replace(b"R", b"X"))
    s3.put("stage/parts/notes.txt")
    assert published(s3, tmp_path / "next") == RECORDS[1:2]
    assert f"Ignoring {s3.uri}/{damaged}: it is damaged" in capsys.readouterr().err
    assert published(s3, tmp_path / "other", key="another hash") == []


def test_work_goes_on_while_the_store_fails_and_its_records_come_later(
    s3: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(parts, "SAMPLES", 1)
    shown = ""

    def has_failed() -> bool:
        nonlocal shown
        shown += capsys.readouterr().err
        return "Could not publish" in shown

    with journal(s3, tmp_path / "first") as first:
        s3.client().delete_bucket(Bucket=s3.bucket)
        first.append(RECORDS[0])
        first.append(RECORDS[1])
        assert eventually(has_failed)
        s3.client().create_bucket(Bucket=s3.bucket)
        first.append(RECORDS[2])
    assert shown.count("Could not publish") == 1
    assert "There is no bucket" in shown
    assert published(s3, tmp_path / "second") == RECORDS[:3]
