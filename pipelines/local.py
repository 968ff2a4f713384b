"""Runs a compiled pipeline on this machine: the YAML as it is shipped, a process per task."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srccore.errors import UserError

__all__ = ["run_locally"]

PAGE = "report.html"


def run_locally(package: Path, arguments: Mapping[str, Any], out: Path) -> Path:
    """Runs a pipeline under kfp's SubprocessRunner.

    Args:
        package: The compiled pipeline.
        arguments: Its run-time parameters.
        out: Gets ``kubeflow/`` (what Kubeflow would keep, one folder per run) and
            ``report.html``.

    Returns:
        The report's path.

    Raises:
        UserError: A task failed; its own words are in the output above.
    """
    from kfp import components, local

    root = out.resolve() / "kubeflow"
    root.mkdir(parents=True, exist_ok=True)
    before = set(root.iterdir())
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root))
    pipeline = components.load_component_from_file(str(package))
    try:
        pipeline(**arguments)
    except RuntimeError as error:
        raise UserError(
            f"The pipeline failed: {' '.join(str(error).split())}",
            f"What the task said stands above. The same command goes on with {out}.",
        ) from None
    (run,) = set(root.iterdir()) - before
    (page,) = run.rglob("report/page*")
    return Path(shutil.copyfile(page, out / PAGE))
