from __future__ import annotations

import os
from pathlib import Path

import pytest
from holding import held_by_another

from srccore.errors import UserError
from srccore.files import LOCK, atomically, hold, writable, write_json


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    write_json(path, {"n": 1})
    with pytest.raises(RuntimeError), atomically(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert [each.name for each in tmp_path.iterdir()] == ["figures.json"]
    assert '"n": 1' in path.read_text(encoding="utf-8")


def test_two_writers_of_one_file_have_a_temporary_file_each(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    with atomically(path) as first, atomically(path) as second:
        assert first != second
        assert first.suffix == second.suffix == ".tmp"
        first.write_text("first", encoding="utf-8")
        second.write_text("second", encoding="utf-8")
    assert [each.name for each in tmp_path.iterdir()] == ["figures.json"]
    assert path.read_text(encoding="utf-8") == "first"


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    write_json(path, {"n": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"n": float("nan")})
    assert '"n": 1' in path.read_text(encoding="utf-8")


def test_an_output_that_cannot_be_written_is_explained_with_its_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    wanted = tmp_path / "file" / "out.yaml"
    with pytest.raises(UserError) as caught, writable(wanted, "-o"):
        wanted.parent.mkdir()
    assert str(wanted) in str(caught.value)
    assert "Choose another -o" in str(caught.value)


def test_content_is_on_the_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(opened: int) -> None:
        order.append(os.readlink(f"/proc/self/fd/{opened}"))
        fsync(opened)

    def note_replace(source: Path, target: Path) -> None:
        order.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_json(tmp_path / "figures.json", {})
    content, renamed, names = order
    assert content.startswith(f"{tmp_path}/figures.json.")
    assert (renamed, names) == ("replace", str(tmp_path))


def test_a_folder_that_another_process_holds_is_refused_until_it_is_killed(tmp_path: Path) -> None:
    with held_by_another(tmp_path) as other:
        with pytest.raises(UserError, match=f"Another process is working on {tmp_path}"):
            hold(tmp_path, wait=False)
        other.kill()
        other.wait()
        held = hold(tmp_path, wait=False)
    assert hold(tmp_path, wait=False) is held
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_folder_that_is_no_longer_held_is_free_for_others(tmp_path: Path) -> None:
    held = hold(tmp_path)
    del held
    with held_by_another(tmp_path):
        pass
