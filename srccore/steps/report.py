"""The last step of a pipeline: the report of its run."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srccore import storage
from srccore.config import validate_config
from srccore.errors import UserError
from srccore.run.folder import CONFIG, REPORT
from srccore.run.report.gather import write_report
from srccore.steps.home import collect_run
from srccore.steps.step import (
    StepInput,
    below,
    explained,
    normalise_root,
    read_reference,
    work_key,
    write_lineage,
)

__all__ = ["report_run"]


def report_run(
    artifact_root: str, last_evaluation: str, page: str, config: Mapping[str, Any]
) -> None:
    """Writes the report of the run that ends with an evaluation.

    The report is also kept under the artifact root, in a folder that `srccore collect` takes.

    Args:
        artifact_root: The folder or ``s3://...`` of the run.
        last_evaluation: The artifact of the last `evaluate`.
        page: The path of the artifact that gets the HTML page.
        config: The run's configuration, as `srccore.config.RunConfig` has it.

    Raises:
        SystemExit: With 2, if something is missing.
    """
    with explained(), tempfile.TemporaryDirectory() as scratch:
        root = normalise_root(artifact_root)
        reference = read_reference(Path(last_evaluation))
        if reference is None:
            raise UserError(
                f"{last_evaluation} is not a reference.",
                "Pass the output of the component evaluate.",
            )
        run = Path(scratch) / "run"
        checked = validate_config(config, "configuration", "Pass the sections of a preset.")
        collect_run(root, reference.uri, checked, run)
        given = {"last_evaluation": [StepInput(reference.uri, below(root, reference.uri))]}
        uri = storage.join(root, f"report/{work_key('report', {'config': checked}, given)}")
        folder = storage.local_path(uri)
        folder.mkdir(parents=True, exist_ok=True)
        for file in (write_report(run), run / CONFIG):
            shutil.copyfile(file, folder / file.name)
        write_lineage(folder, "report", None, given, root)
        storage.publish(folder, uri)
        Path(page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / REPORT, page)
        print(f"Report: {uri}. To fetch the run: srccore collect {uri} -o RUN", file=sys.stderr)
