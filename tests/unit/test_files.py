from __future__ import annotations

from pathlib import Path

import pytest

from srccore.errors import UserError
from srccore.files import atomically, writable, write_json


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
