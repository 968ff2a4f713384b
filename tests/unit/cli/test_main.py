"""``srccore`` itself: its help and its version."""

from __future__ import annotations

import subprocess
import sys

from typer.main import get_command
from typer.testing import CliRunner

import srccore
from srccore.cli.main import GROUPS, app


def test_the_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"srccore {srccore.__version__}\n")


def test_help_lists_every_command_once_in_its_group() -> None:
    listed = [name for names in GROUPS.values() for name in names]
    assert sorted(listed) == sorted(get_command(app).commands)
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"})
    lines = result.output.splitlines()
    titles = [lines.index(f"{title}:") for title in GROUPS]
    assert titles == sorted(titles)
    shown = [line.split()[0] for line in lines[titles[0] :] if line[:2] == "  " and line[2:3] > " "]
    assert [name for name in shown if name in listed] == listed
    assert max(map(len, lines)) <= 80
    assert "..." not in result.output.partition("Local:")[2], "a sentence is cut off"


def test_help_is_shown_without_a_heavy_package() -> None:
    code = (
        "import sys\n"
        "from srccore.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'kfp', 'kubernetes', 'pydantic', 'numpy', 'boto3', 'rich', 'ssl'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
