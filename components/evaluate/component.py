"""Judges a policy's rationales and answers on the held-out split."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from srccore.components.interface import stage_component

__all__ = ["evaluate"]


@stage_component("evaluate")
def evaluate(
    data: Input[Dataset],
    policy: Input[Model],
    artifact_root: str,
    config: dict,
    round_number: int,
    evaluation: Output[Artifact],
    metrics: Output[Metrics],
    seed: int = 0,
    previous: Input[Artifact] = None,
    device: str = "auto",
    threads: int = 0,
):
    """Answers every sample with greedy decoding, and judges the rationales and answers.

    Args:
        data: The held-out split, or any data set.
        policy: The policy, a ``policy.json``.
        artifact_root: The folder or ``s3://...`` under which outputs are written.
        config: The ``evaluation`` section of a preset.
        round_number: 0 for the policy after stage 1, then the number of the round.
        seed: The seed of the bootstrap.
        previous: The evaluation of the previous policy on the same data, to compute the change.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of torch; 0 for torch's default.
        evaluation: Output. The responses, judgements and metrics.
        metrics: Output. The metrics.
    """
    from srccore.steps.step import run_stage

    done = run_stage(
        "evaluate",
        artifact_root,
        inputs={
            "data": data.path,
            "policy": policy.path,
            "previous": previous.path if previous else None,
        },
        settings={"config": config, "seed": seed, "round_number": round_number},
        device=device,
        threads=threads,
    )
    done.refer(evaluation.path)
    done.log(metrics)
