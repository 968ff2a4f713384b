"""How much memory some work takes, as Linux counts it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path


def peak(work: Callable[[], object]) -> int:
    """How much more memory was resident at the peak of some work than before it, in bytes."""

    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before
