"""Writes the report of a run."""

from kfp.dsl import HTML, Artifact, Input, Output

from srccore.components.interface import stage_component

__all__ = ["report"]


@stage_component("report")
def report(
    last_evaluation: Input[Artifact],
    artifact_root: str,
    name: str,
    seed: int,
    shards: int,
    data: dict,
    model: dict,
    rating_model: dict,
    augmentation: dict,
    rationale: dict,
    annotation: dict,
    scorer: dict,
    search: dict,
    scoring: dict,
    curation: dict,
    dpo: dict,
    evaluation: dict,
    page: Output[HTML],
):
    """Writes the report of a run: one HTML page with metrics, samples and settings.

    Args:
        last_evaluation: The run's last evaluation, from which the rest of the run is found.
        artifact_root: The folder or ``s3://...`` of the run.
        name: The title of the run.
        seed: The run's seed.
        shards: The number of shards of a round.
        data: The section of that name in the run's configuration.
        model: The section of that name.
        rating_model: The section of that name.
        augmentation: The section of that name.
        rationale: The section of that name.
        annotation: The section of that name.
        scorer: The section of that name.
        search: The section of that name.
        scoring: The section of that name.
        curation: The section of that name.
        dpo: The section of that name.
        evaluation: The section of that name.
        page: Output. The report.
    """
    from srccore.steps.report import report_run

    config = {
        "name": name,
        "seed": seed,
        "shards": shards,
        "data": data,
        "model": model,
        "rating_model": rating_model,
        "augmentation": augmentation,
        "rationale": rationale,
        "annotation": annotation,
        "scorer": scorer,
        "search": search,
        "scoring": scoring,
        "curation": curation,
        "dpo": dpo,
        "evaluation": evaluation,
    }
    report_run(artifact_root, last_evaluation.path, page.path, config)
