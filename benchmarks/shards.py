"""Times search, scoring and evaluation with one worker and with several.

    python benchmarks/shards.py --workers 2

The preset `tiny` from its first stage to R-Scorer is run once, and not timed. A turn is one stage
into an empty folder, with everything that it does: starting its workers, loading the model, writing
the output. On a machine with as many idle cores as workers, the ratio is what is gained.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import Timing, alternate, arguments, report

from srccore.config import RunConfig, load_config
from srccore.run.console import ConsoleObserver, quiet_libraries
from srccore.run.folder import RunFolder
from srccore.run.loop import run, set_threads
from srccore.stages.candidates import score_candidates, search_candidates
from srccore.stages.evaluation import evaluate
from srccore.training.machine import Machine


def stages(
    config: RunConfig, run_folder: Path, scratch: Path
) -> dict[str, Callable[[tuple[int, ...]], object]]:
    """Returns what runs each stage again, given its workers."""
    folder, numbers = RunFolder(run_folder), itertools.count()
    policy, calibration = folder.trained_policy(0), folder.split("calibration")
    found = folder.output("search-candidates", 1, 0)

    def given(workers: tuple[int, ...]) -> dict[str, Any]:
        machine = Machine(config.device, workers=workers)
        return {"out": scratch / str(next(numbers)), "machine": machine}

    return {
        "search-candidates": lambda workers: search_candidates(
            config.search,
            data=calibration,
            policy=policy,
            seed=0,
            round_number=1,
            **given(workers),
        ),
        "score-candidates": lambda workers: score_candidates(
            config.scoring,
            data=calibration,
            candidates=found,
            scorer=folder.output("train-scorer"),
            rationales=folder.rationales("calibration"),
            **given(workers),
        ),
        "evaluate": lambda workers: evaluate(
            config.evaluation,
            data=folder.split("heldout"),
            policy=policy,
            seed=0,
            round_number=0,
            **given(workers),
        ),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--run", type=Path, help="a run of tiny with a finished round 1, for reuse")
    parser.add_argument("--set", action="append", default=[], help="a setting of the preset")
    given = arguments(__doc__, parser)
    quiet_libraries()
    config = load_config("tiny", ["rounds=1", *given.set])
    set_threads(config.threads)
    results: dict[str, dict[str, Timing]] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = given.run or scratch / "run"
        run(config, folder, ConsoleObserver.on_stderr())
        for stage, again in stages(config, folder, scratch).items():
            # The first has a process of its own, too, so that both load the model.
            ways = {
                "1 worker": lambda again=again: again((0,)),
                f"{given.workers} workers": lambda again=again: again(tuple(range(given.workers))),
            }
            results[stage] = alternate(ways, given.repetitions)
    report(results, given.json)


if __name__ == "__main__":
    main()
