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
