"""Stage 3: R-Scorer rates every ordered pair of candidates."""

from kfp.dsl import Dataset, Input, Model, Output

from srccore.components.interface import stage_component

__all__ = ["score_candidates"]


@stage_component("score-candidates")
def score_candidates(
    data: Input[Dataset],
    candidates: Input[Dataset],
    scorer: Input[Model],
    artifact_root: str,
    config: dict,
    ratings: Output[Dataset],
    rationales: Input[Dataset] = None,
    device: str = "auto",
    threads: int = 0,
):
    """Stage 3: R-Scorer rates every ordered pair of a sample's candidates.

    Args:
        data: The split that the candidates respond to.
        candidates: The output of search-candidates.
        scorer: The output of train-scorer.
        artifact_root: The folder or ``s3://...`` under which outputs are written.
        config: The ``scoring`` section of a preset.
        rationales: The output of augment-rationales on the same data.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of torch; 0 for torch's default.
        ratings: Output. A rating of every ordered pair, and of candidate and reference.
    """
    from srccore.steps.step import run_stage

    done = run_stage(
        "score-candidates",
        artifact_root,
        inputs={
            "data": data.path,
            "candidates": candidates.path,
            "scorer": scorer.path,
            "rationales": rationales.path if rationales else None,
        },
        settings={"config": config},
        device=device,
        threads=threads,
    )
    done.refer(ratings.path)
