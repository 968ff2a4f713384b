"""The frame of the benchmarks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[3] / "benchmarks")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    # A script finds what is in its own folder.
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_ways_take_turns_and_the_first_turn_is_not_counted() -> None:
    from timing import alternate

    turns: list[str] = []
    found = alternate({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 2)
    assert turns == ["b", "a", "a", "b", "b", "a"]
    assert [len(timing.seconds) for timing in found.values()] == [2, 2]


def test_a_ratio_is_the_median_of_the_ratios_of_repetitions() -> None:
    from timing import Timing, table

    slow, fast = Timing((2.0, 9.0, 4.0)), Timing((1.0, 3.0, 1.0))
    # 2 / 1, 9 / 3, 4 / 1; the medians alone would give 4.
    assert fast.times_faster_than(slow) == (3.0, 2.0, 4.0)
    assert "| ours | 1.000 | 1.000 to 3.000 | 3.00 (2.00 to 4.00) |" in table(
        {"theirs": slow, "ours": fast}
    )


def test_everything_is_written_to_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from timing import Timing, arguments, report

    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["b.py", "--repetitions", "1", "--json", str(file)])
    given = arguments("What it does.")
    report({"a table": {"a": Timing((1.0,))}}, given.json, {"tokens": 3})
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["seconds"] == {"a table": {"a": [1.0]}}
    assert written["notes"] == {"tokens": 3}
    assert "## a table" in capsys.readouterr().out
