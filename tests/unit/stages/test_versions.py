"""The version of a stage is part of its keys: a change of its code is a decision about it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from versions import COMMAND, RECORDED, found

from srccore.errors import UserError
from srccore.stages.folder import StageFolder
from srccore.stages.table import STAGES, Stage
from srccore.steps.step import work_key


def test_a_change_of_the_code_behind_a_stage_was_decided_on() -> None:
    known, now = json.loads(RECORDED.read_text(encoding="utf-8")), found()
    files = known["files"].keys() | now["files"].keys()
    changed = {path for path in files if known["files"].get(path) != now["files"].get(path)}
    behind = {
        f"{name} (version {stage['version']}): {', '.join(sorted(changed & set(stage['files'])))}"
        for name, stage in now["stages"].items()
        if changed & set(stage["files"])
    }
    assert known == now, (
        "Code behind stages has changed. Where it computes something else from the same inputs and "
        "settings, raise the stage's version in srccore/stages/table.py: finished work is then "
        f"done again. In either case, record the decision with: {COMMAND}\n"
        + "\n".join(sorted(behind))
    )


@pytest.mark.parametrize(
    ("stage", "path", "is_behind"),
    [
        ("search-candidates", "srccore/method/search.py", True),
        ("search-candidates", "srccore/models/vllm.py", True),
        ("train-dpo", "srccore/training/shared_prompt.py", True),
        ("prepare-data", "srccore/embedded/world.py", True),
        ("prepare-data", "srccore/method/search.py", False),
        ("train-dpo", "srccore/stages/folder.py", False),
    ],
)
def test_the_files_behind_a_stage_are_those_that_compute(
    stage: str, path: str, is_behind: bool
) -> None:
    assert (path in found()["stages"][stage]["files"]) is is_behind


def test_another_version_is_other_work_and_another_release_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage("stage", "A stage.", "light")
    StageFolder(stage, tmp_path).finish({"answer": 42})
    monkeypatch.setattr("srccore.__version__", "99.0")
    assert StageFolder(stage, tmp_path).figures == {"answer": 42}
    with pytest.raises(UserError, match="already holds the output of a different stage"):
        StageFolder(dataclasses.replace(stage, version=2), tmp_path)
    key = work_key("train-dpo", {}, {})
    raised = dataclasses.replace(STAGES["train-dpo"], version=99)
    monkeypatch.setattr("srccore.steps.step.STAGES", {"train-dpo": raised})
    assert work_key("train-dpo", {}, {}) != key
