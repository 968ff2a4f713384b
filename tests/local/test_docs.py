"""The commands of the pages exist, the quick ones run, and links and quoted messages are right."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from srccore.config import load_config
from srccore.pipelines.profile import load_profile

ROOT = Path(__file__).parents[2]
GROUPS = ("data", "images", "runs", "stage")
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "RELEASE.md", "SECURITY.md")),
    *(ROOT / name for name in ("benchmarks/RESULTS.md", "images/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "manifests").rglob("README.md")),
)
FILLED_IN = "\0"
"""Stands for a value that is filled in."""


def _commands() -> list[list[str]]:
    commands = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    commands.append(words)
    return [list(words) for words in dict.fromkeys(map(tuple, commands))]


@functools.cache
def _help(*words: str) -> str:
    """The help of a command, cached: many pages have the same commands."""
    done = _run(*words, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def _values(words: list[str], option: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word == option]


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
    if "--" in module:  # the rest is for another program
        module = module[: module.index("--")]
    depth = 2 if module[1] in GROUPS else 1
    subcommand = [word for word in module[1:] if not word.startswith("-")][:depth]
    if "--help" in module:
        subcommand = []
    said = _help(module[0], *subcommand)
    for option in (word for word in module if word.startswith("-")):
        assert re.search(rf"(^|[\s,/]){re.escape(option)}\b", said), option
    if {"run", "compile"} & set(subcommand):
        (preset,) = _values(module, "--preset")
        config = load_config(preset, _values(module, "--set"))
        for profile in map(Path, _values(module, "--profile")):
            # Any other profile is a site's own.
            if profile.is_relative_to("manifests"):
                load_profile(ROOT / profile, config)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_to_what_is_there(page: Path) -> None:
    text = page.read_text()
    for path, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        if heading:
            found = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert heading in [_anchor(each) for each in found], (path, heading)
    for path in re.findall(r"-[kf] (manifests/[\w./-]+)", text):
        if path not in ("manifests/overlays/site", "manifests/secrets.yaml"):
            assert (ROOT / path).exists(), path


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_what_operators_are_told_to_look_for_is_what_the_code_says() -> None:
    page = (ROOT / "docs" / "operate.md").read_text()
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    quotes = [each for cell in cells for each in re.findall(r"`([^`]+)`", cell) if " " in each]
    assert len(quotes) > 30
    messages = "\n".join(_messages())

    def is_said(quote: str) -> bool:
        # The dots stand for a value that is filled in, or for a part of the message.
        parts = [re.escape(part) for part in quote.split("...") if part]
        return re.search(r"[^\n]*".join(parts), messages) is not None

    assert [quote for quote in quotes if not is_said(quote)] == []


def _messages() -> set[str]:
    """All string literals of the code, each on one line."""
    found = set()
    for path in (ROOT / "srccore").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ""
            if isinstance(node, ast.JoinedStr):
                text = "".join(
                    each.value if isinstance(each, ast.Constant) else FILLED_IN
                    for each in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = re.sub(r"\{\w*\}", FILLED_IN, node.value)
            found.add(text.replace("\n", " "))
    return found


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
