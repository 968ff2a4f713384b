"""Trains R-Scorer on teacher ratings."""

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from srccore.components.interface import stage_component

__all__ = ["train_scorer"]


@stage_component("train-scorer")
def train_scorer(
    data: Input[Dataset],
    labelled_pairs: Input[Dataset],
    artifact_root: str,
    config: dict,
    annotation: dict,
    model: dict,
    scorer: Output[Model],
    metrics: Output[Metrics],
    seed: int = 0,
    rationales: Input[Dataset] = None,
    device: str = "auto",
    threads: int = 0,
):
    """Trains R-Scorer on teacher ratings, and validates it on samples it was not trained on.

    Args:
        data: The train split.
        labelled_pairs: The output of annotate-ratings.
        artifact_root: The folder or ``s3://...`` under which outputs are written.
        config: The ``scorer`` section of a preset.
        annotation: The ``annotation`` section of a preset: the share held out for validation.
        model: The ``rating_model`` section of a preset: the base checkpoint.
        seed: The run's seed.
        rationales: The output of augment-rationales on the same data.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of torch; 0 for torch's default.
        scorer: Output. R-Scorer, for score-candidates.
        metrics: Output. The losses, and the agreement with the teacher on the held-out samples.
    """
    from srccore.steps.step import run_stage

    done = run_stage(
        "train-scorer",
        artifact_root,
        inputs={
            "data": data.path,
            "labelled_pairs": labelled_pairs.path,
            "rationales": rationales.path if rationales else None,
        },
        settings={"config": config, "annotation": annotation, "model": model, "seed": seed},
        device=device,
        threads=threads,
    )
    done.refer(scorer.path)
    done.log(metrics)
