"""Stages curate-preference and train-dpo: from ratings to the next policy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from srccore.config import CurationConfig, DpoConfig
from srccore.data.records import (
    CandidateSet,
    Preference,
    Rating,
    Unrated,
    read_records,
    write_records,
)
from srccore.errors import UserError
from srccore.method import curation
from srccore.stages.folder import StageFolder
from srccore.stages.rationales import judged_samples
from srccore.stages.splits import open_split
from srccore.training.machine import Figures, Machine
from srccore.training.ranks import is_first

__all__ = ["curate_preference", "train_dpo"]


def curate_preference(
    config: CurationConfig,
    *,
    data: Path,
    candidates: Sequence[Path],
    ratings: Sequence[Path],
    out: Path,
    machine: Machine = Machine(),
) -> Figures:
    """Stage 4: confidence-weighted preferences from all shards of a round.

    Args:
        config: The curation's settings.
        data: The split that the candidates answer.
        candidates: The folders of `search_candidates`.
        ratings: The folders of `score_candidates`.
        out: Where ``preferences.jsonl`` is written.
        machine: How the work is done; progress counts samples, all at once.

    Returns:
        How many preferences, why samples gave none, and how margins and confidences lie.
    """
    inputs: dict[str, Path | Sequence[Path]] = {
        "data": data,
        "candidates": candidates,
        "ratings": ratings,
    }
    folder = StageFolder("curate-preference", out, config=config, inputs=inputs)
    if folder.figures is not None:
        return folder.figures
    sets = [
        record
        for path in candidates
        for record in read_records(path / "candidates.jsonl", CandidateSet)
    ]
    samples = judged_samples(data, None, [record.sample_id for record in sets])
    rated = [rating for path in ratings for rating in read_records(path / "ratings.jsonl", Rating)]
    # Ratings that somebody else made need not say what they leave out.
    left_out = [file for path in ratings if (file := path / "unrated.jsonl").is_file()]
    unrated = {record.sample_id for file in left_out for record in read_records(file, Unrated)}
    # The order of shards must not matter.
    result = curation.curate(
        samples, sorted(sets, key=lambda record: record.sample_id), rated, config, unrated
    )
    write_records(out / "preferences.jsonl", Preference, result.preferences)
    machine.progress(len(sets), len(sets))
    figures = result.figures.model_dump(mode="json")
    return folder.finish({"reasons": result.reasons, **figures})


def train_dpo(
    config: DpoConfig,
    *,
    data: Path,
    preferences: Path,
    policy: Path,
    out: Path,
    seed: int,
    machine: Machine = Machine(),
) -> Figures:
    """Stage 5: preference fine-tuning of the round's policy (paper: DPO with an SFT term).

    Args:
        config: The training's settings.
        data: The split that the preferences answer.
        preferences: The folder of `curate_preference`.
        policy: The ``policy.json`` of the round's starting policy, which is the reference too.
        out: Where ``policy.json``, with one more adapter, is written.
        seed: The run's seed.
        machine: How the work is done; progress counts optimiser steps.

    Returns:
        Steps, losses, rewards, and how much of the new adapter is left after folding.

    Raises:
        UserError: There are no preferences, or most of the adapter is lost in folding.
    """
    from srccore.models.policy import read_policy, write_policy
    from srccore.stages.trained import check_kept, figures_and_work, load_trained
    from srccore.training.dpo import PreferenceExample
    from srccore.training.dpo import train_dpo as train

    folder = StageFolder(
        "train-dpo",
        out,
        config=config,
        inputs={"data": data, "preferences": preferences, "policy": policy},
        settings={"seed": seed},
    )
    if folder.figures is not None:
        return folder.figures
    opened = open_split(data)
    examples = [
        PreferenceExample(
            question=opened.sample(record.sample_id).question,
            chosen=record.chosen,
            rejected=record.rejected,
            image=functools.partial(opened.image, record.sample_id),
            size=opened.size(record.sample_id),
        )
        for record in read_records(preferences / "preferences.jsonl", Preference)
    ]
    if not examples:
        raise UserError(
            f"{preferences} has no preferences to train on.",
            "See the reasons in its manifest.json. Start another run with a lower "
            "curation.min_margin, a higher curation.anchor_tolerance or more search.samples.",
        )
    start = read_policy(policy)
    outcome = train(start, examples, config, out, seed=seed, machine=machine)
    figures, work = figures_and_work(outcome)
    if not is_first():
        return figures
    adapter = out / "adapter"
    trained = start.with_adapter(adapter)
    kept = load_trained(trained, machine).folding.newest
    check_kept(kept, adapter=adapter, dtype=start.base.dtype, section="dpo")
    write_policy(out, trained)
    figures["folding"] = dataclasses.asdict(kept)
    return folder.finish(figures, work, gpus=outcome.training.gpus)
