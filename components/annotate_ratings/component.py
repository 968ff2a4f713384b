"""Asks a teacher to rate pairs of sampled responses."""

from kfp.dsl import Dataset, Input, Output

from srccore.components.interface import stage_component

__all__ = ["annotate_ratings"]


@stage_component("annotate-ratings")
def annotate_ratings(
    data: Input[Dataset],
    candidates: Input[Dataset],
    artifact_root: str,
    config: dict,
    labelled_pairs: Output[Dataset],
    seed: int = 0,
    rationales: Input[Dataset] = None,
):
    """Asks a teacher to rate pairs of sampled responses, which R-Scorer learns from.

    Args:
        data: The train split.
        candidates: Responses to it, from sample-responses or search-candidates.
        artifact_root: The folder or ``s3://...`` under which outputs are written.
        config: The ``annotation`` section of a preset.
        seed: The run's seed; it determines which pairs are rated.
        rationales: The output of augment-rationales on the same data.
        labelled_pairs: Output. Pairs of responses with their ratings.
    """
    from srccore.steps.step import run_stage

    done = run_stage(
        "annotate-ratings",
        artifact_root,
        inputs={
            "data": data.path,
            "candidates": candidates.path,
            "rationales": rationales.path if rationales else None,
        },
        settings={"config": config, "seed": seed},
    )
    done.refer(labelled_pairs.path)
