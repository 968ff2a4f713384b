"""Stage 2: sentence-level beam search for candidate responses."""

from kfp.dsl import Dataset, Input, Model, Output

from srccore.components.interface import stage_component

__all__ = ["search_candidates"]


@stage_component("search-candidates")
def search_candidates(
    data: Input[Dataset],
    policy: Input[Model],
    artifact_root: str,
    config: dict,
    round_number: int,
    candidates: Output[Dataset],
    seed: int = 0,
    shard: int = 0,
    shards: int = 1,
    device: str = "auto",
    threads: int = 0,
):
    """Stage 2: searches for candidate responses to a round's samples, or to a shard of them.

    Args:
        data: The split that the round's samples are drawn from, or any data set.
        policy: The policy, a ``policy.json``.
        artifact_root: The folder or ``s3://...`` under which outputs are written.
        config: The ``search`` section of a preset.
        round_number: The round, from 1; every round draws different samples.
        seed: The run's seed.
        shard: The index of the shard, from 0.
        shards: The number of shards.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of torch; 0 for torch's default.
        candidates: Output. The candidates for every sample of the shard.
    """
    from srccore.steps.step import run_stage

    done = run_stage(
        "search-candidates",
        artifact_root,
        inputs={"data": data.path, "policy": policy.path},
        settings={
            "config": config,
            "seed": seed,
            "round_number": round_number,
            "shard": (shard, shards),
        },
        device=device,
        threads=threads,
    )
    done.refer(candidates.path)
