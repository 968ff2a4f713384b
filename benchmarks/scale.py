"""Whether time per sample and memory stay the same with more samples.

    python benchmarks/scale.py --json scale.json

Searches and scores 64 to 512 samples of the embedded world with the embedded models. Time per
sample is between the first and the last progress report, so that loading does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from srccore.config import DataConfig, ModelConfig, load_config
from srccore.embedded.model import MODELS
from srccore.models.policy import Policy, write_policy
from srccore.stages.candidates import score_candidates, search_candidates
from srccore.stages.data import prepare_data
from srccore.stages.manifest import read_manifest
from srccore.training.machine import Machine

SIZES = (64, 128, 256, 512)


class Clock:
    """Receives progress, and keeps the first and the last report."""

    def __init__(self) -> None:
        self.reports: list[tuple[float, int]] = []

    def __call__(self, done: int, total: int) -> None:
        """Notes a report."""
        self.reports.append((time.perf_counter(), done))

    @property
    def per_sample(self) -> float:
        """Seconds per sample after the first report."""
        (began, first), (ended, last) = self.reports[0], self.reports[-1]
        return (ended - began) / (last - first)


def make_inputs(folder: Path) -> None:
    """Writes a data set, a policy and an R-Scorer."""
    prepare_data(DataConfig(train=4, calibration=max(SIZES), heldout=4), folder / "data")
    write_policy(folder, Policy(base=ModelConfig(path="embedded:lvlm")))
    (folder / "scorer").mkdir()
    (folder / "scorer" / "model").symlink_to(MODELS / "rating")


def measure(folder: Path, samples: int, turn: int) -> dict[str, float]:
    """Searches and scores some samples; returns seconds per sample and memory by stage."""
    config = load_config("tiny", [f"search.samples={samples}", "search.batch_tokens=420"])
    out = folder / f"{samples}-{turn}"
    searching, scoring = Clock(), Clock()
    search_candidates(
        config.search,
        data=folder / "data" / "calibration.parquet",
        policy=folder / "policy.json",
        out=out / "search",
        seed=0,
        round_number=1,
        machine=Machine("cpu", progress=searching),
    )
    score_candidates(
        config.scoring,
        data=folder / "data" / "calibration.parquet",
        candidates=out / "search",
        scorer=folder / "scorer",
        out=out / "score",
        machine=Machine("cpu", progress=scoring),
    )
    return {
        "search, ms per sample": 1000 * searching.per_sample,
        "scoring, ms per sample": 1000 * scoring.per_sample,
        "search, peak MB": read_manifest(out / "search").peak_memory_mb,
        "scoring, peak MB": read_manifest(out / "score").peak_memory_mb,
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all measurements")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        for turn in range(given.repetitions):
            for size in SIZES[:: 1 if turn % 2 else -1]:
                found[size].append(measure(folder, size, turn))
    names = list(found[SIZES[0]][0])
    print("| samples | " + " | ".join(names) + " |")
    print("| ---: | " + " | ".join("---:" for _ in names) + " |")
    for size, turns in found.items():
        cells = []
        for each in names:
            values = [turn[each] for turn in turns]
            cells.append(
                f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"
            )
        print(f"| {size} | " + " | ".join(cells) + " |")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
