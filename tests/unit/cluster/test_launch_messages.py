"""What a step says about its job, whose log and events others write."""

from __future__ import annotations

import pytest

from srccore.cluster.launch import JobFailed, _say


def test_a_line_of_a_pods_log_is_shown_with_its_escapes_visible(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _say("\x1b[31mstep 1\x1b[0m\r")
    assert capsys.readouterr().err == "⟨U+001B⟩[31mstep 1⟨U+001B⟩[0m\n"


def test_why_a_job_failed_is_shown_without_escapes_and_passwords() -> None:
    error = JobFailed("Pulling https://ann:s3cret@registry failed: \x1b]0;title\x07.", "Fix it.")
    assert str(error) == "Pulling https://registry failed: ⟨U+001B⟩]0;title⟨U+0007⟩. Fix it."
