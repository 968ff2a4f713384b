"""Writes the three splits of a data set."""

from kfp.dsl import Dataset, Output

from srccore.components.interface import stage_component

__all__ = ["prepare_data"]


@stage_component("prepare-data")
def prepare_data(
    artifact_root: str,
    config: dict,
    train: Output[Dataset],
    calibration: Output[Dataset],
    heldout: Output[Dataset],
    version: str = "",
):
    """Writes the train, calibration and held-out splits of a data set.

    Args:
        artifact_root: The folder or ``s3://...`` under which outputs are written.
        config: The ``data`` section of a preset.
        version: Any text. Kubeflow caches by it, so change it when the data set changes.
        train: Output. The split that stage 1 and R-Scorer learn from.
        calibration: Output. The split that the rounds draw samples from.
        heldout: Output. The split that only evaluation may read.
    """
    from srccore.steps.step import run_stage

    done = run_stage("prepare-data", artifact_root, inputs={}, settings={"config": config})
    done.refer(train.path, "train.parquet")
    done.refer(calibration.path, "calibration.parquet")
    done.refer(heldout.path, "heldout.parquet")
