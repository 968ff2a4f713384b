"""The commands of the pages exist, and the quick ones run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from srccore.config import load_config

ROOT = Path(__file__).parents[2]
GROUPS = ("data", "images", "runs", "stage")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def _commands() -> list[list[str]]:
    commands = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    commands.append(words)
    return commands


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_a_documented_command_exists_with_its_options(words: list[str]) -> None:
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[0] == "python" and words[1] != "-m":
        assert (ROOT / words[1]).is_file()
        return
    module = words[2:] if words[0] == "python" else words
    assert words[0] in ("srccore", "python"), words
    if "--" in module:  # what follows is another program's
        module = module[: module.index("--")]
    depth = 2 if module[1] in GROUPS else 1
    subcommand = [word for word in module[1:] if not word.startswith("-")][:depth]
    if "--help" in module:
        subcommand = []
    result = _run(module[0], *subcommand, "--help")
    assert result.returncode == 0, result.stderr
    for option in (word for word in module if word.startswith("-")):
        assert re.search(rf"(^|[\s,/]){re.escape(option)}\b", result.stdout), option
    if "run" in subcommand:
        sets = [module[i + 1] for i, word in enumerate(module) if word == "--set"]
        load_config(module[module.index("--preset") + 1], sets)


def test_the_quick_commands_of_the_readme_run(finished: Path, tmp_path: Path) -> None:
    quick = [
        ["srccore", "presets"],
        ["srccore", "report", "{run}"],
        ["srccore", "export", "{run}", "--round", "1", "-o", "{tmp}/exported"],
        ["srccore", "data", "validate", "{run}/data/train.parquet"],
        ["srccore.embedded", "preview", "--out", "{tmp}/items.png"],
    ]
    for words in quick:
        result = _run(*(word.format(run=finished, tmp=tmp_path) for word in words))
        assert result.returncode == 0, (words, result.stderr)
    assert (tmp_path / "items.png").stat().st_size > 10_000
