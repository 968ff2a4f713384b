"""A process of a training job that replaces the worker and does what a test tells it to.

``--task`` is JSON: what the process of each rank must ``do`` (Python), and whether it joins the
others over gloo. It succeeds once the file ``go`` exists.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from srccore.cluster.worker import supervised


def work(task: dict[str, Any]) -> None:
    rank = os.environ["RANK"]
    folder = Path(task["folder"])
    if not task["joins"]:
        begin(folder, rank, task["do"])
        wait_for(folder / "go")
        return
    from srccore.training.ranks import joined

    with joined("cpu") as processes:
        processes.wait()
        begin(folder, rank, task["do"])
        while not processes.from_first((folder / "go").exists()):
            time.sleep(0.05)


def begin(folder: Path, rank: str, do: dict[str, str]) -> None:
    (folder / f"began-{rank}").touch()
    # Written by the tests themselves.
    exec(do.get(rank, ""))


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--world-size")
    parser.add_argument("--task", type=json.loads)
    given = parser.parse_args()
    sys.exit(supervised(lambda: work(given.task)))
