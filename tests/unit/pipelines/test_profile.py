"""Profiles that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from srccore.config import load_config
from srccore.errors import UserError
from srccore.pipelines.profile import load_profile

LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAUGHS, "Cannot read the profile .*: it stands for .* values, more than 10,000"),
        ("shards: 2\nshards: 3", "'shards' is there twice, the second time in line 2"),
        ("- a", "is not a YAML mapping"),
        ("1: 2", "Invalid profile"),
        ("light: {cpu: '\u0661', memory: 1Gi, timeout_hours: 1}", r"light\.cpu"),
        ("models: {cpu: '1', memory: '\u0661Gi', timeout_hours: 1}", r"models\.memory"),
    ],
    ids=range(6),
)
def test_a_profile_that_is_not_one_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=told):
        load_profile(path, load_config("tiny"))
