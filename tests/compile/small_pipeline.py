"""A small pipeline with the structure of ours: two nested rounds with a loop, settings as dicts.

kfp reads annotations as they are written, so `annotations` is not imported from `__future__`.
"""

from pathlib import Path

from kfp import compiler, dsl, kubernetes

import srccore
from srccore.config import load_config

CONFIG = load_config("tiny").model_dump(mode="json", exclude_none=True)


@dsl.component(base_image="python:3.11-slim")
def prepare(artifact_root: str, data: dict) -> str:
    return artifact_root


@dsl.component(base_image="python:3.11-slim")
def search(shard: int, search: dict, seed: int) -> int:
    return shard


@dsl.component(base_image="python:3.11-slim")
def train(policy: str, dpo: dict, device: str) -> str:
    return policy


@dsl.pipeline(name="src-round")
def src_round(policy: str, search_config: dict, dpo: dict, seed: int, device: str) -> str:
    with dsl.ParallelFor(items=[0, 1], parallelism=2) as shard:
        found = search(shard=shard, search=search_config, seed=seed)
    trained = train(policy=policy, dpo=dpo, device=device).after(found)
    kubernetes.set_timeout(trained, seconds=3600)
    return trained.output


@dsl.pipeline(name="src-tiny", description=f"srccore {srccore.__version__}, preset tiny")
def src_tiny(
    artifact_root: str,
    seed: int = 0,
    device: str = "cpu",
    threads: int = 0,
    data: dict = CONFIG["data"],
    model: dict = CONFIG["model"],
    rating_model: dict = CONFIG["rating_model"],
    augmentation: dict = CONFIG["augmentation"],
    rationale: dict = CONFIG["rationale"],
    annotation: dict = CONFIG["annotation"],
    scorer: dict = CONFIG["scorer"],
    search: dict = CONFIG["search"],
    scoring: dict = CONFIG["scoring"],
    curation: dict = CONFIG["curation"],
    dpo: dict = CONFIG["dpo"],
    evaluation: dict = CONFIG["evaluation"],
    scorer_uri: str = "",
    tolerations: list = [],
):
    policy = prepare(artifact_root=artifact_root, data=data).output
    for number in (1, 2):
        made = src_round(
            policy=policy, search_config=search, dpo=dpo, seed=seed, device=device
        ).set_display_name(f"round {number}")
        policy = made.output


def compile_small(path: Path) -> Path:
    """Compiles it as ``srccore compile`` does."""
    compiler.Compiler().compile(src_tiny, str(path))
    return path
