"""Make preferences from candidates that you already have: only score and curate.

The candidates are in one or more folders, each with a ``candidates.jsonl`` (docs/components.md
describes its format). Each folder is scored by a pod of its own.

    python examples/score_and_curate.py score_and_curate.yaml
"""

import sys

from kfp import compiler, dsl
from kfp.dsl import Dataset

from srccore.components import curate_preference, import_output, score_candidates


@dsl.pipeline(name="score-and-curate")
def score_and_curate(
    artifact_root: str,
    data_uri: str,
    scorer_uri: str,
    candidates_uris: list,
    curation: dict = {"min_margin": 0.2},
    device: str = "auto",
    threads: int = 0,
) -> Dataset:
    """Rates candidates, and turns the ratings into preferences.

    Args:
        artifact_root: Where outputs are written: ``s3://bucket/prefix``.
        data_uri: The data set that the candidates respond to.
        scorer_uri: The folder of an R-Scorer.
        candidates_uris: Folders with a ``candidates.jsonl`` each.
        curation: The ``curation`` section of a preset.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of torch; 0 for torch's default.
    """
    data = (
        import_output(uri=data_uri)
        .set_caching_options(False)
        .set_display_name("data")
        .outputs["output"]
    )
    scorer = (
        import_output(uri=scorer_uri)
        .set_caching_options(False)
        .set_display_name("R-Scorer")
        .outputs["output"]
    )
    with dsl.ParallelFor(candidates_uris, parallelism=4) as uri:
        given = import_output(uri=uri).set_caching_options(False)
        rated = score_candidates(
            data=data,
            candidates=given.outputs["output"],
            scorer=scorer,
            config={},
            artifact_root=artifact_root,
            device=device,
            threads=threads,
        )
    return curate_preference(
        data=data,
        candidates=dsl.Collected(given.outputs["output"]),
        ratings=dsl.Collected(rated.outputs["ratings"]),
        config=curation,
        artifact_root=artifact_root,
    ).outputs["preferences"]


if __name__ == "__main__":
    package = sys.argv[1] if sys.argv[1:] else "score_and_curate.yaml"
    compiler.Compiler().compile(score_and_curate, package)
