from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_part_of_the_gpu_benchmark_runs_on_a_cpu_with_tiny_models(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--smoke", "--out", tmp_path, "--work", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    parts = Counter(
        line.split(" | ")[1] for line in table.splitlines() if line.startswith("| llava-")
    )
    assert set(parts.values()) == {2}
    assert {"greedy decoding against generate", "search", "DPO loss against TRL"} <= parts.keys()
    # In float32, no row of a greedy batch may differ.
    assert table.count("; 0 rows differ") == 2


def test_without_a_gpu_the_benchmark_says_how_to_run_it() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py"],
        cwd=ROOT,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert "Pass --smoke" in done.stderr
