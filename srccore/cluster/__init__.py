"""Where a training stage runs: in the pod of its step, or as a job that the step watches."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from srccore.step import Finished, run_stage

__all__ = ["train"]


def train(
    stage: str,
    artifact_root: str,
    *,
    launcher: str,
    inputs: Mapping[str, str | Sequence[str] | None],
    settings: Mapping[str, Any],
    device: str = "auto",
    threads: int = 0,
) -> Finished:
    """Runs a training stage by a launcher; for the rest see `srccore.step.run_stage`.

    Args:
        stage: Its name.
        artifact_root: The folder or ``s3://...`` below which it writes.
        launcher: ``inprocess``. ``pytorchjob`` compiles, and is refused here until the training
            job is part of the suite.
        inputs: Paths of Kubeflow's artifacts.
        settings: The stage function's other arguments.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of torch; 0 leaves it alone.

    Returns:
        Where its folder lies, and its figures.

    Raises:
        SystemExit: With 2, where the user can mend what is wrong.
    """
    if launcher != "inprocess":
        print(
            f"Error: This release cannot train as a {launcher}. Compile the pipeline with "
            "launcher: inprocess in its profile.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return run_stage(
        stage, artifact_root, inputs=inputs, settings=settings, device=device, threads=threads
    )
