"""How long `srccore compile` takes, whole process: ``python benchmarks/compiling.py``.

The first call of each preset is not counted: it writes bytecode and warms the file cache.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from srccore.config import preset_names

REPEATS = 5


def seconds(preset: str, out: Path) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-m", "srccore", "compile", "--preset", preset, "-o", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    print("| preset | compile, median of 5 (s) | slowest | file (kB) |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for preset in preset_names():
            out = Path(folder) / f"{preset}.yaml"
            seconds(preset, out)
            taken = [seconds(preset, out) for _ in range(REPEATS)]
            size = out.stat().st_size / 1000
            print(f"| {preset} | {statistics.median(taken):.2f} | {max(taken):.2f} | {size:.0f} |")


if __name__ == "__main__":
    main()
