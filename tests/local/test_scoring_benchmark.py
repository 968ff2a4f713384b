from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_the_scoring_benchmark_compares_equal_ratings_and_losses(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    command = ["benchmarks/scoring.py", "--part", "tiny", "--part", "training"]
    done = subprocess.run(
        [sys.executable, *command, "--samples", "2", "--repetitions", "1", "--json", file],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    ways = {title: set(timings) for title, timings in found["seconds"].items()}
    assert ways == {
        "scoring, tiny": {"whole prompts, padded", "generate and parse", "srccore"},
        "training R-Scorer": {"plain TRL, padded", "srccore"},
    }
    notes = found["notes"]
    # Two samples of five candidates and the reference each: 30 ordered pairs.
    assert notes["tiny: pairs"] == 60
    assert (
        notes["tiny: tokens that srccore computes"] < notes["tiny: tokens of the whole prompts"] / 3
    )
