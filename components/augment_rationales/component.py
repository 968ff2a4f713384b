"""Has a teacher write the rationales that a data set lacks."""

from kfp.dsl import Dataset, Input, Output

from srccore.components.interface import stage_component

__all__ = ["augment_rationales"]


@stage_component("augment-rationales")
def augment_rationales(
    data: Input[Dataset], artifact_root: str, config: dict, rationales: Output[Dataset]
):
    """Has a teacher write the rationales that a data set lacks.

    Args:
        data: A split of prepare-data, or a data set.
        artifact_root: The folder or ``s3://...`` below which outputs are written.
        config: The section ``augmentation`` of a preset.
        rationales: Output. One rationale for every sample that has one now.
    """
    from srccore.steps.step import run_stage

    done = run_stage(
        "augment-rationales",
        artifact_root,
        inputs={"data": data.path},
        settings={"config": config},
    )
    done.refer(rationales.path)
