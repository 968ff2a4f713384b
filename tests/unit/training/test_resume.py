"""Checkpoints on a disk and in a bucket: which one is the newest complete one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import s3_server
from s3_server import S3Server

from srccore import storage
from srccore.errors import UserError
from srccore.files import MANIFEST
from srccore.training.resume import Checkpoints, PublishedCheckpoints, Timetable

moto, versitygw = s3_server.moto, s3_server.versitygw
s3, no_aws = s3_server.s3, s3_server.no_aws


def write(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"weights")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_kept_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoint")
    assert checkpoints.newest() is None
    # By number: as strings, 20 would come before 3.
    for step in (3, 20):
        checkpoints.save(step, write)
        assert checkpoints.newest() == step
    assert names(checkpoints.folder) == ["step-20"]
    assert names(checkpoints.bring(20)) == [MANIFEST, "weights.safetensors"]


def test_one_that_was_cut_off_does_not_count_and_is_cleared_away(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, write)

    def half(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(4, half)
    assert checkpoints.newest() == 2
    (tmp_path / "step-6").mkdir()
    write(tmp_path / "step-6")
    assert checkpoints.newest() == 2
    checkpoints.save(4, write)
    assert names(tmp_path) == ["step-4"]


@pytest.mark.parametrize("name", [MANIFEST, "weights.safetensors"])
def test_a_damaged_one_is_named_and_an_older_whole_one_counts(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoint")
    checkpoints.save(2, write)
    shutil.copytree(tmp_path / "checkpoint", tmp_path / "older")
    checkpoints.save(4, write)
    (tmp_path / "older" / "step-2").rename(tmp_path / "checkpoint" / "step-2")
    damaged = tmp_path / "checkpoint" / "step-4" / name
    damaged.write_bytes(bytes(damaged.stat().st_size))
    assert checkpoints.newest() == 2
    assert "Ignoring the checkpoint of step 4" in capsys.readouterr().err
    storage.remove(str(tmp_path / "checkpoint" / "step-2"))
    assert checkpoints.newest() is None


def test_a_damaged_one_in_a_bucket_does_not_count(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (4, 2):
        published(s3).save(step, write)
    s3.put("train-dpo/key/checkpoint/step-4/weights.safetensors", b"altered")
    monkeypatch.setenv("SRCCORE_CACHE", str(tmp_path / "another machine"))
    assert published(s3).newest() == 2
    assert (published(s3).bring(2) / "weights.safetensors").read_bytes() == b"weights"


def test_the_same_step_is_made_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for _ in range(2):
        checkpoints.save(2, write)
    assert names(tmp_path) == ["step-2"]


def test_one_on_another_machine_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot see the checkpoint .*s3://"):
        Checkpoints(tmp_path).bring(2)


def published(s3: S3Server) -> PublishedCheckpoints:
    uri = f"{s3.uri}/train-dpo/key/checkpoint"
    return PublishedCheckpoints(storage.local_path(uri), uri)


def test_a_machine_without_the_disk_fetches_it(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert published(s3).newest() is None
    for step in (2, 4):
        published(s3).save(step, write)
    assert sorted(s3.keys()) == [
        f"train-dpo/key/checkpoint/step-4/{name}" for name in (MANIFEST, "weights.safetensors")
    ]
    monkeypatch.setenv("SRCCORE_CACHE", str(tmp_path / "another machine"))
    assert published(s3).newest() == 4
    found = published(s3).bring(4)
    assert found.is_relative_to(tmp_path / "another machine")
    assert (found / "weights.safetensors").read_bytes() == b"weights"


def test_one_that_is_half_uploaded_does_not_count(s3: S3Server) -> None:
    published(s3).save(2, write)
    s3.put("train-dpo/key/checkpoint/step-4/weights.safetensors")
    assert published(s3).newest() == 2


def test_the_bucket_decides_so_that_all_machines_go_on_from_the_same(s3: S3Server) -> None:
    checkpoints = published(s3)
    checkpoints.save(2, write)
    # Written here, but cut off before it was uploaded.
    Checkpoints(checkpoints.folder).save(4, write)
    assert checkpoints.newest() == 2
    assert (checkpoints.bring(2) / MANIFEST).is_file()


@pytest.mark.parametrize("s3", ["versitygw"], indirect=True)
def test_a_training_without_permission_to_delete_continues_and_says_so(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    user = s3.with_user_who_may("s3:ListBucket", "s3:GetObject", "s3:PutObject")
    for name, value in user.environment.items():
        monkeypatch.setenv(name, value)
    for step in (2, 4):
        published(s3).save(step, write)
    assert published(s3).newest() == 4
    said = capsys.readouterr().err
    assert "Could not delete" in said
    assert "checkpoint/step-2" in said
    assert "s3:DeleteObject" in said


def test_a_newer_one_of_another_pod_is_let_alone(s3: S3Server) -> None:
    for step in (6, 2):
        published(s3).save(step, write)
    assert published(s3).newest() == 6


def saves(steps: int, seconds: float, cost: float, minutes: float = 10) -> list[int]:
    """The steps after which a training saves, given the seconds of a step and of a saving."""
    now = 0.0
    timetable = Timetable(minutes, clock=lambda: now)
    found = []
    for done in range(1, steps + 1):
        now += seconds
        if timetable.is_due(done, steps):
            now += cost
            timetable.saved()
            found.append(done)
    return found


# Steps of stage 1 and of a round in the LLaVA presets, at 128 and at 16 samples; R-Scorer's:
# 2,000 samples x 0.85 x 8 pairs x 2 orders / 16.
@pytest.mark.parametrize("steps", [94, 157, 750, 1250, 1700])
@pytest.mark.parametrize("seconds", [0.5, 10])
def test_every_training_saves_ten_times_however_fast_it_is(steps: int, seconds: float) -> None:
    found = saves(steps, seconds, cost=0.1)
    assert found[-1] == steps
    assert len(found) > 10
    # No more than a tenth of the training is lost.
    gaps = [after - before for before, after in zip([0, *found[:-1]], found, strict=True)]
    assert max(gaps) <= steps / 10


def test_a_slow_training_saves_every_ten_minutes() -> None:
    # 110 steps of 2 minutes: after each 10 steps, and after 5 since the last.
    assert saves(110, 120, cost=6) == list(range(5, 111, 5))


def test_savings_do_not_take_more_than_a_tenth_of_the_time() -> None:
    # 110 steps of 1 s, each eleventh of which takes 10 s; saving takes 3 s, so 30 s must pass.
    assert saves(110, 1, cost=3) == [10, 40, 70, 100, 110]
    # But after 20 s at most, if they are wanted.
    assert saves(110, 1, cost=3, minutes=1 / 3) == [10, 30, 50, 70, 90, 110]


def test_a_training_of_few_steps_saves_after_each() -> None:
    assert saves(4, 1, cost=0.05) == [1, 2, 3, 4]


def test_none_is_saved_where_none_is_wanted() -> None:
    assert saves(94, 60, cost=1, minutes=0) == []
