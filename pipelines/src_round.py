"""One round as a sub-pipeline: search, score, curate, align.

Search and scoring of a shard are in the same loop body, so that no shard waits for another. The
shards are constants of the loop: a task that lists them would add a level.
"""

from collections.abc import Callable
from typing import Any

from kfp import dsl
from kfp.dsl import Dataset, Input, Model

from srccore.components.curate_preference.component import curate_preference
from srccore.components.score_candidates.component import score_candidates
from srccore.components.search_candidates.component import search_candidates
from srccore.components.train_dpo.component import train_dpo
from srccore.pipelines.pods import Placement, Pods

__all__ = ["make_round"]


def make_round(pods: Pods) -> Callable[..., Any]:
    """Creates the sub-pipeline of a round.

    Args:
        pods: Configures the pods of its tasks.

    Returns:
        A graph component.
    """
    profile = pods.profile
    shards = list(range(profile.shards))

    @dsl.pipeline(name="src-round")
    def src_round(
        data: Input[Dataset],
        rationales: Input[Dataset],
        policy: Input[Model],
        r_scorer: Input[Model],
        round_number: int,
        artifact_root: str,
        search: dict,
        scoring: dict,
        curation: dict,
        dpo: dict,
        seed: int,
        device: str,
        threads: int,
        node_selector: dict,
        tolerations: list,
        training_memory: str,
        training_gpus: str,
    ) -> Model:
        common = {"data": data, "artifact_root": artifact_root}
        placement = Placement(node_selector, tolerations, training_memory, training_gpus)
        with dsl.ParallelFor(items=shards, parallelism=profile.parallelism or len(shards)) as shard:
            found = search_candidates(
                **common,
                policy=policy,
                config=search,
                round_number=round_number,
                seed=seed,
                shard=shard,
                shards=len(shards),
                **pods.compute("search-candidates", device, threads),
            )
            pods.configure(found, "search-candidates", placement)
            rated = score_candidates(
                **common,
                candidates=found.outputs["candidates"],
                scorer=r_scorer,
                config=scoring,
                rationales=rationales,
                **pods.compute("score-candidates", device, threads),
            )
            pods.configure(rated, "score-candidates", placement)
        curated = curate_preference(
            **common,
            candidates=dsl.Collected(found.outputs["candidates"]),
            ratings=dsl.Collected(rated.outputs["ratings"]),
            config=curation,
        )
        pods.configure(curated, "curate-preference", placement)
        trained = train_dpo(
            **common,
            preferences=curated.outputs["preferences"],
            policy=policy,
            config=dpo,
            seed=seed,
            round_number=round_number,
            **pods.training("train-dpo", placement),
            **pods.compute("train-dpo", device, threads),
        )
        pods.configure(trained, "train-dpo", placement)
        return trained.outputs["aligned"]

    return src_round
