"""Samples the responses that R-Scorer learns from."""

from kfp.dsl import Dataset, Input, Model, Output

from srccore.components.interface import stage_component

__all__ = ["sample_responses"]


@stage_component("sample-responses")
def sample_responses(
    data: Input[Dataset],
    policy: Input[Model],
    artifact_root: str,
    config: dict,
    annotation: dict,
    candidates: Output[Dataset],
    seed: int = 0,
    device: str = "auto",
    threads: int = 0,
):
    """Samples whole responses of a policy, for a teacher to rate and R-Scorer to learn from.

    Args:
        data: The train split.
        policy: The policy, a ``policy.json``; usually from tune-rationale.
        artifact_root: The folder or ``s3://...`` under which outputs are written.
        config: The ``search`` section of a preset.
        annotation: The ``annotation`` section of a preset: the number of samples and responses.
        seed: The run's seed.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of torch; 0 for torch's default.
        candidates: Output. The responses to every sample.
    """
    from srccore.steps.step import run_stage

    done = run_stage(
        "sample-responses",
        artifact_root,
        inputs={"data": data.path, "policy": policy.path},
        settings={"config": config, "annotation": annotation, "seed": seed},
        device=device,
        threads=threads,
    )
    done.refer(candidates.path)
