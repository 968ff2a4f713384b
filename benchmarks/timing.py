"""Times several ways to do one thing inside one run, so that a busy machine slows all of them.

The ways take turns, and each is compared with a baseline of the same repetition: ratios stay
meaningful on a machine whose speed changes, seconds do not. A benchmark is a script with this
frame:

    given = arguments(__doc__)                      # --repetitions N, --json FILE
    found = alternate({"peer": theirs, "ours": ours}, given.repetitions)
    report({"title of a table": found}, given.json)
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Timing", "alternate", "arguments", "report", "table"]


@dataclass(frozen=True)
class Timing:
    """How long each repetition of one way took, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median repetition."""
        return statistics.median(self.seconds)

    def times_faster_than(self, other: Timing) -> tuple[float, float, float]:
        """Compares with another way, repetition by repetition.

        Returns:
            The median, the least and the greatest of the ratios.
        """
        ratios = [theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def alternate(
    ways: Mapping[str, Callable[[], object]],
    repetitions: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Runs all ways in turn, several times.

    Args:
        ways: What to time, by name. A way that returns a float has timed itself, without its
            preparations. On a GPU, a way must wait for the card before it returns.
        repetitions: Of each way; one before them is not counted, because it warms caches.
        clock: Returns the time in seconds. ``time.process_time``, the CPU time of this process, is
            steadier where one thread computes and the machine is busy.

    Returns:
        The timings by name.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        # Every other turn is in reverse, so that none always follows the same one.
        for name, way in list(ways.items())[:: 1 if repetition % 2 else -1]:
            began = clock()
            own = way()
            if repetition:
                taken[name].append(own if isinstance(own, float) else clock() - began)
    return {name: Timing(tuple(seconds)) for name, seconds in taken.items()}


def table(timings: Mapping[str, Timing]) -> str:
    """Writes a table in Markdown; the first way is the baseline."""
    baseline = next(iter(timings.values()))
    lines = [
        "| way | median (s) | fastest to slowest | times faster than the first |",
        "| --- | ---: | --- | --- |",
    ]
    for name, timing in timings.items():
        ratio, least, greatest = timing.times_faster_than(baseline)
        spread = f"{min(timing.seconds):.3f} to {max(timing.seconds):.3f}"
        compared = "" if timing is baseline else f"{ratio:.2f} ({least:.2f} to {greatest:.2f})"
        lines.append(f"| {name} | {timing.median:.3f} | {spread} | {compared} |")
    return "\n".join(lines)


def arguments(
    description: str | None, parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """Reads a benchmark's command line.

    Args:
        description: The docstring of the benchmark.
        parser: A parser that has the benchmark's own options, if it has any.
    """
    parser = parser or argparse.ArgumentParser()
    parser.description = (description or "").partition("\n")[0]
    parser.add_argument("--repetitions", type=int, default=5, help="of each way (default: 5)")
    parser.add_argument("--json", type=Path, help="file for all timings")
    return parser.parse_args()


def report(
    results: Mapping[str, Mapping[str, Timing]],
    file: Path | None,
    notes: Mapping[str, object] | None = None,
) -> None:
    """Prints a table per title, and writes everything to a file.

    Args:
        results: Timings by title and way.
        file: The file for JSON, or None.
        notes: What else was counted or compared; printed and written.
    """
    for title, timings in results.items():
        print(f"## {title}\n\n{table(timings)}\n")
    for name, value in (notes or {}).items():
        print(f"* {name}: {value}")
    if file is not None:
        written = {
            "machine": f"{platform.machine()}, {platform.system()}, Python "
            f"{platform.python_version()}",
            "seconds": {
                title: {name: timing.seconds for name, timing in timings.items()}
                for title, timings in results.items()
            },
            "notes": dict(notes or {}),
        }
        file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
