"""A new stage takes the files that CONTRIBUTING.md lists: a copy of the code gets one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from new_stage import CHANGES
from PIL import Image

from srccore.data.dataset import write_data
from srccore.data.records import Sample

ROOT = Path(__file__).parents[2]
NUMBERS = {"Six": 6, "Seven": 7, "Eight": 8}
COMPILE = """
from pathlib import Path
from srccore.config import load_config
from srccore.containers.names import Images
from srccore.pipelines.compiling import compile_pipeline
from srccore.pipelines.profile import load_profile
from srccore.pipelines.regenerate import generated

page = Path("components/count_samples/README.md")
for path, text in generated():
    if path.parent == page.parent:
        Path(path.name).write_text(text)
    if path == page:
        break
config = load_config("tiny", ["counting.at_most=3"])
profile = load_profile(None, config, rounds=1)
Path("tiny.yaml").write_text(compile_pipeline(config, profile, Images()))
"""
LOOP = """
import sys
from pathlib import Path
from shrunken import Recorder, shrunken
from srccore.run.loop import run

recorder = Recorder(interrupt_at="augment-rationales")
try:
    run(shrunken("counting.at_most=3"), Path("run"), recorder)
except KeyboardInterrupt:
    print(*recorder.worked)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three source folders, where an installed package has them, and the stage in them."""
    copy = tmp_path_factory.mktemp("copy")
    for name, place in ("srccore", ""), ("components", "srccore"), ("pipelines", "srccore"):
        ignored = shutil.ignore_patterns("__pycache__", "compiled", "models")
        shutil.copytree(ROOT / name, copy / place / name, ignore=ignored)
    # Too large to copy, and only read.
    (copy / "srccore/embedded/models").symlink_to(ROOT / "srccore/embedded/models")
    for path, insertions in CHANGES.items():
        file = copy / _place(path)
        file.parent.mkdir(exist_ok=True)
        text = file.read_text() if file.exists() else ""
        for before, new in insertions:
            assert before in text, f"{path} no longer contains {before!r}"
            text = text.replace(before, new + before, 1)
        file.write_text(text)
    return copy


def _place(path: str) -> str:
    return path if path.startswith("srccore/") else f"srccore/{path}"


def _run(copy: Path, *command: object) -> str:
    """Runs Python on the copy, in the copy's folder, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=copy,
        env={**os.environ, "PYTHONPATH": f"{copy}:{Path(__file__).parent}"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_lists_the_files_that_a_new_stage_takes() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (section,) = re.findall(r"^### A stage$(.*?)^### ", page, re.MULTILINE | re.DOTALL)
    section = section.replace("<stage>", "count_samples").replace("<subject>", "counting")
    entries = re.findall(r"^\d\. (`[^:\n]+)", section, re.MULTILINE)
    # Of two files in one entry, a stage takes one.
    listed = [
        next((file for file in re.findall(r"`([^`]+)`", entry) if file in CHANGES), entry)
        for entry in entries
    ]
    assert sorted(listed) == sorted(CHANGES)
    (number,) = re.findall(r"^(\w+) files, then `make compiled`", section, re.MULTILINE)
    assert NUMBERS[number] == len(CHANGES)


def test_a_new_stage_is_a_command_and_runs(copy: Path, tmp_path: Path) -> None:
    assert "Count the samples" in _run(copy, "-m", "srccore", "stage", "count-samples", "--help")
    pixel = tmp_path / "pixel.png"
    Image.new("RGB", (1, 1)).save(pixel)
    samples = [
        Sample(id=str(number), category="math", question="How many?", answer="1")
        for number in range(5)
    ]
    data = tmp_path / "data.parquet"
    write_data(data, ((sample, pixel.read_bytes()) for sample in samples))
    arguments = ["--data", data, "--out", tmp_path / "out", "--set", "counting.at_most=3"]
    counted = _run(copy, "-m", "srccore", "stage", "count-samples", *arguments)
    assert json.loads(counted) == {"samples": 3}
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_new_stage_is_part_of_the_loop(copy: Path) -> None:
    assert _run(copy, "-c", LOOP).split() == ["prepare-data", "count-samples", "augment-rationales"]
    manifest = json.loads((copy / "run" / "count-samples" / "manifest.json").read_text())
    assert manifest["figures"] == {"samples": 3}


def test_a_new_stage_has_an_image(copy: Path) -> None:
    assert "localhost/srccore/count-samples:" in _run(copy, "-m", "srccore", "images", "list")


def test_a_new_stage_is_a_component_with_a_page_and_a_task_of_the_pipeline(copy: Path) -> None:
    _run(copy, "-c", COMPILE)
    assert "exec-count-samples" in (copy / "component.yaml").read_text()
    assert "| `counts` | Dataset |" in (copy / "README.md").read_text()
    pipeline = (copy / "tiny.yaml").read_text()
    assert "taskInfo:\n          name: count-samples" in pipeline
    assert "at_most: 3" in pipeline
