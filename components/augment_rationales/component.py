"""Asks a teacher to write the rationales missing from a data set."""

from kfp.dsl import Dataset, Input, Output

from srccore.components.interface import stage_component

__all__ = ["augment_rationales"]


@stage_component("augment-rationales")
def augment_rationales(
    data: Input[Dataset], artifact_root: str, config: dict, rationales: Output[Dataset]
):
    """Asks a teacher to write the rationales missing from a data set.

    Args:
        data: A split from prepare-data, or any data set.
        artifact_root: The folder or ``s3://...`` under which outputs are written.
        config: The ``augmentation`` section of a preset.
        rationales: Output. A rationale for each sample that has one now.
    """
    from srccore.steps.step import run_stage

    done = run_stage(
        "augment-rationales",
        artifact_root,
        inputs={"data": data.path},
        settings={"config": config},
    )
    done.refer(rationales.path)
