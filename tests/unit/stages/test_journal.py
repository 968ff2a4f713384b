"""What an unfinished stage has done so far."""

from __future__ import annotations

from pathlib import Path

import pytest

from srccore.data.records import Rationale
from srccore.stages.journal import Journal

# Separators that some readers take for the end of a line, and a two-byte letter.
TEXTS = ("a\u2028b", "c\u0085d", "é")
RECORDS = [Rationale(sample_id=f"s{number}", rationale=text) for number, text in enumerate(TEXTS)]


def test_any_text_comes_back_as_it_was(tmp_path: Path) -> None:
    journal = Journal(tmp_path, Rationale)
    journal.append(*RECORDS)
    assert journal.records() == RECORDS


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_record_that_an_interruption_cut_is_not_there_and_the_next_one_follows(
    tmp_path: Path, cut: int
) -> None:
    journal = Journal(tmp_path, Rationale)
    journal.append(*RECORDS)
    # Some of the cuts are within the two-byte letter.
    journal.path.write_bytes(journal.path.read_bytes()[:-cut])
    assert journal.records() == RECORDS[:2]
    journal.append(RECORDS[2])
    assert journal.records() == RECORDS


def test_a_line_that_cannot_be_read_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(tmp_path, Rationale)
    journal.append(*RECORDS)
    lines = journal.path.read_bytes().split(b"\n")
    lines[1] = b"\0" * len(lines[1])
    journal.path.write_bytes(b"\n".join(lines))
    assert journal.records() == [RECORDS[0], RECORDS[2]]
    assert f"Ignoring unreadable lines of {journal.path} (1 of 3)" in capsys.readouterr().err


def test_the_first_record_of_a_thing_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path, Rationale)
    journal.append(RECORDS[0], Rationale(sample_id="s0", rationale="Another."))
    assert journal.records() == RECORDS[:1]
