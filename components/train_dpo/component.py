"""Stage 5: preference fine-tuning of the round's policy."""

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from srccore_components.interface import stage_component

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
    launcher: str = "inprocess",
    device: str = "auto",
    threads: int = 0,
):
    """Stage 5: preference fine-tuning of the round's policy by DPO with an SFT term.

    Args:
        data: The split that the preferences answer.
        preferences: From curate-preference.
        policy: The ``policy.json`` that the round began with.
        artifact_root: The folder or ``s3://...`` below which outputs are written.
        config: The section ``dpo`` of a preset.
        seed: The run's seed.
        launcher: ``inprocess`` trains in this pod.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of torch; 0 leaves it alone.
        aligned: Output. A ``policy.json`` with one adapter more.
        metrics: Output. Steps, losses and rewards.
    """
    from srccore.cluster import train

    done = train(
        "train-dpo",
        artifact_root,
        launcher=launcher,
        inputs={"data": data.path, "preferences": preferences.path, "policy": policy.path},
        settings={"config": config, "seed": seed},
        device=device,
        threads=threads,
    )
    done.write_policy(aligned.path)
    done.log(metrics)
