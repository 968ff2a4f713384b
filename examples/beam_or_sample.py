"""Compare beam search with plain sampling on the same samples, using the Python components.

python examples/beam_or_sample.py beam_or_sample.yaml
"""

import sys

from kfp import compiler, dsl

from srccore.components import import_output, prepare_data, score_candidates, search_candidates

SEARCH = {"samples": 12, "candidates": 3, "width": 2, "branch": 2, "max_sentence_tokens": 24}


@dsl.pipeline(name="beam-or-sample")
def beam_or_sample(
    artifact_root: str,
    policy_uri: str,
    scorer_uri: str,
    data: dict = {"train": 60, "calibration": 40, "heldout": 20},
    device: str = "auto",
    threads: int = 0,
) -> None:
    """Searches the same samples in two ways, and rates both with R-Scorer.

    Args:
        artifact_root: Where outputs are written: ``s3://bucket/prefix``.
        policy_uri: The policy, a ``policy.json``.
        scorer_uri: The folder of an R-Scorer.
        data: The ``data`` section of a preset.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of torch; 0 for torch's default.
    """
    root = {"artifact_root": artifact_root}
    compute = {"device": device, "threads": threads}
    calibration = prepare_data(config=data, **root).outputs["calibration"]
    policy = import_output(uri=policy_uri).set_caching_options(False).outputs["output"]
    scorer = import_output(uri=scorer_uri).set_caching_options(False).outputs["output"]
    for strategy in ("beam", "sample"):
        found = search_candidates(
            data=calibration,
            policy=policy,
            config={**SEARCH, "strategy": strategy},
            round_number=1,
            **root,
            **compute,
        ).set_display_name(strategy)
        score_candidates(
            data=calibration,
            candidates=found.outputs["candidates"],
            scorer=scorer,
            config={},
            **root,
            **compute,
        ).set_display_name(f"score {strategy}")


if __name__ == "__main__":
    package = sys.argv[1] if sys.argv[1:] else "beam_or_sample.yaml"
    compiler.Compiler().compile(beam_or_sample, package)
