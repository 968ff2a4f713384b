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
    round_number: int = 0,
    launcher: str = "inprocess",
    job: dict = {},
    node_selector: dict = {},
    tolerations: list = [],
    training_memory: str = "",
    training_gpus: str = "",
    device: str = "auto",
    threads: int = 0,
):
    """Trains R-Scorer on teacher ratings, and validates it on samples it was not trained on.

    It trains in this pod, or in a job that this pod creates and watches.

    Args:
        data: The train split.
        labelled_pairs: The output of annotate-ratings.
        artifact_root: The folder or ``s3://...`` under which outputs are written.
        config: The ``scorer`` section of a preset.
        annotation: The ``annotation`` section of a preset: the share held out for validation.
        model: The ``rating_model`` section of a preset: the base checkpoint.
        seed: The run's seed.
        rationales: The output of augment-rationales on the same data.
        round_number: The round, part of the job's name; 0 before the first one.
        launcher: ``inprocess`` trains in this pod, ``pytorchjob`` in a job of the Training
            Operator, ``trainjob`` in a job of Trainer v2.
        job: The pods of the job, and how long it may take.
        node_selector: The node selector of the job's pods; if set, replaces the one in ``job``.
        tolerations: The tolerations of the job's pods; if set, replace those in ``job``.
        training_memory: The memory of each of the job's pods; if set, replaces that in ``job``.
        training_gpus: The GPUs of each of the job's pods; if set, replace those in ``job``.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of torch; 0 for torch's default.
        scorer: Output. R-Scorer, for score-candidates.
        metrics: Output. The losses, and the agreement with the teacher on the held-out samples.
    """
    from srccore.cluster.train import train

    done = train(
        "train-scorer",
        artifact_root,
        launcher=launcher,
        inputs={
            "data": data.path,
            "labelled_pairs": labelled_pairs.path,
            "rationales": rationales.path if rationales else None,
        },
        settings={"config": config, "annotation": annotation, "model": model, "seed": seed},
        device=device,
        threads=threads,
        round_number=round_number,
        job=job,
        node_selector=node_selector,
        tolerations=tolerations,
        memory=training_memory,
        gpus=training_gpus,
    )
    done.refer(scorer.path)
    done.log(metrics)
