"""Stage 5: preference fine-tuning of the round's policy."""

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from srccore.components.interface import stage_component

__all__ = ["train_dpo"]


@stage_component("train-dpo")
def train_dpo(
    data: Input[Dataset],
    preferences: Input[Dataset],
    policy: Input[Model],
    artifact_root: str,
    config: dict,
    aligned: Output[Model],
    metrics: Output[Metrics],
    seed: int = 0,
    round_number: int = 1,
    launcher: str = "inprocess",
    job: dict = {},
    node_selector: dict = {},
    tolerations: list = [],
    training_memory: str = "",
    training_gpus: str = "",
    device: str = "auto",
    threads: int = 0,
):
    """Stage 5: preference fine-tuning of the round's policy by DPO with an SFT term.

    It trains in this pod, or in a job that this pod creates and watches.

    Args:
        data: The split that the preferences belong to.
        preferences: The output of curate-preference.
        policy: The policy that the round started with, a ``policy.json``.
        artifact_root: The folder or ``s3://...`` under which outputs are written.
        config: The ``dpo`` section of a preset.
        seed: The run's seed.
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
        aligned: Output. The aligned policy, a ``policy.json`` with one more adapter.
        metrics: Output. The steps, losses and rewards.
    """
    from srccore.cluster.train import train

    done = train(
        "train-dpo",
        artifact_root,
        launcher=launcher,
        inputs={"data": data.path, "preferences": preferences.path, "policy": policy.path},
        settings={"config": config, "seed": seed},
        device=device,
        threads=threads,
        round_number=round_number,
        job=job,
        node_selector=node_selector,
        tolerations=tolerations,
        memory=training_memory,
        gpus=training_gpus,
    )
    done.write_policy(aligned.path)
    done.log(metrics)
