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
        policy: A ``policy.json``, of tune-rationale as a rule.
        artifact_root: The folder or ``s3://...`` below which outputs are written.
        config: The section ``search`` of a preset.
        annotation: The section ``annotation`` of a preset: how many samples and responses.
        seed: The run's seed.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of torch; 0 leaves it alone.
        candidates: Output. The responses of every sample.
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
