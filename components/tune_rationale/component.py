"""Stage 1: teaches the model to write a rationale before its answer."""

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from srccore.components.interface import stage_component

__all__ = ["tune_rationale"]


@stage_component("tune-rationale")
def tune_rationale(
    data: Input[Dataset],
    artifact_root: str,
    config: dict,
    model: dict,
    policy: Output[Model],
    metrics: Output[Metrics],
    seed: int = 0,
    rationales: Input[Dataset] = None,
    device: str = "auto",
    threads: int = 0,
):
    """Stage 1: teaches the model to write a rationale before its answer.

    Args:
        data: The train split.
        artifact_root: The folder or ``s3://...`` under which outputs are written.
        config: The ``rationale`` section of a preset.
        model: The ``model`` section of a preset: the base checkpoint.
        seed: The run's seed.
        rationales: The output of augment-rationales on the same data. Without it, samples that
            have no rationale of their own are left out.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of torch; 0 for torch's default.
        policy: Output. The policy, a ``policy.json``: the base model and the trained adapter.
        metrics: Output. The steps and losses.
    """
    from srccore.steps.step import run_stage

    done = run_stage(
        "tune-rationale",
        artifact_root,
        inputs={"data": data.path, "rationales": rationales.path if rationales else None},
        settings={"config": config, "model": model, "seed": seed},
        device=device,
        threads=threads,
    )
    done.write_policy(policy.path)
    done.log(metrics)
