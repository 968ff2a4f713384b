"""Stage 4: ratings to confidence-weighted preferences."""

from typing import List

from kfp.dsl import Dataset, Input, Metrics, Output

from srccore.components.interface import stage_component

__all__ = ["curate_preference"]


@stage_component("curate-preference")
def curate_preference(
    data: Input[Dataset],
    candidates: Input[List[Dataset]],
    ratings: Input[List[Dataset]],
    artifact_root: str,
    config: dict,
    preferences: Output[Dataset],
    metrics: Output[Metrics],
):
    """Stage 4: confidence-weighted preferences from all shards of a round.

    Args:
        data: The split that the candidates answer.
        candidates: All shards of search-candidates.
        ratings: All shards of score-candidates.
        artifact_root: The folder or ``s3://...`` below which outputs are written.
        config: The section ``curation`` of a preset.
        preferences: Output. The round's preferences.
        metrics: Output. How many there are, and why samples gave none.
    """
    from srccore.steps.step import run_stage

    done = run_stage(
        "curate-preference",
        artifact_root,
        inputs={
            "data": data.path,
            "candidates": [each.path for each in candidates],
            "ratings": [each.path for each in ratings],
        },
        settings={"config": config},
    )
    done.refer(preferences.path)
    done.log(metrics)
