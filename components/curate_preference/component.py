"""Stage 4: turns ratings into confidence-weighted preferences."""

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
    """Stage 4: turns the ratings of all shards of a round into confidence-weighted preferences.

    Args:
        data: The split that the candidates respond to.
        candidates: The outputs of search-candidates for all shards.
        ratings: The outputs of score-candidates for all shards.
        artifact_root: The folder or ``s3://...`` under which outputs are written.
        config: The ``curation`` section of a preset.
        preferences: Output. The round's preferences.
        metrics: Output. The number of preferences, and why samples have none.
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
