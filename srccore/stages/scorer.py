"""Stages annotate-ratings and train-scorer: R-Scorer, from teacher ratings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from srccore.config import AnnotationConfig, ScorerConfig, ScoringConfig, TextModelConfig
from srccore.data import sampling
from srccore.data.records import (
    REFERENCE,
    CandidateSet,
    LabelledPair,
    Sample,
    Unusable,
    read_records,
    write_records,
)
from srccore.errors import UserError
from srccore.hashing import stable_hash
from srccore.method import scoring
from srccore.method.duplicates import words
from srccore.models.engines import rating_engine
from srccore.stages import inputs as identify
from srccore.stages.checks import check_facts
from srccore.stages.folder import StageFolder
from srccore.stages.journal import Journal
from srccore.stages.rationales import judged_samples
from srccore.training.machine import Figures, Machine
from srccore.training.ranks import is_first

__all__ = ["annotate_ratings", "train_scorer"]


def annotate_ratings(
    config: AnnotationConfig,
    *,
    data: Path,
    candidates: Path,
    out: Path,
    seed: int,
    rationales: Path | None = None,
    machine: Machine = Machine(),
) -> Figures:
    """Asks a teacher to rate pairs of sampled responses, for R-Scorer to learn from.

    Args:
        config: The teacher, and how many pairs a sample gives.
        data: The train split.
        candidates: The folder of `sample_responses` on that split.
        out: Where ``labelled_pairs.jsonl`` is written.
        seed: The run's seed; decides which pairs.
        rationales: The folder of `augment_rationales` on that split.
        machine: How the work is done; progress counts pairs rated.

    Returns:
        How many pairs got each rating, and problems by reason.
    """
    from srccore.models.teacher import PairRequest, make_teacher

    folder = StageFolder(
        "annotate-ratings",
        out,
        config=config,
        inputs={"data": data, "candidates": candidates, "rationales": rationales},
        settings={"seed": seed},
    )
    if folder.figures is not None:
        return folder.figures
    sets = list(read_records(candidates / "candidates.jsonl", CandidateSet))
    samples = judged_samples(data, rationales, [record.sample_id for record in sets])
    check_facts("annotate-ratings", config, list(samples.values()), data)
    pairs = [
        (samples[record.sample_id], first, second)
        for record in sets
        for first, second in (
            *_some_pairs(record, config.pairs, seed),
            *_some_references(record, samples[record.sample_id], config.reference_pairs, seed),
        )
    ]
    faults: list[str] = []
    kept: Journal[LabelledPair | Unusable] = folder.journal(machine, LabelledPair, Unusable)
    with kept as journal:
        known = {(pair.sample_id, pair.first, pair.second) for pair in journal.records()}
        todo = [
            PairRequest(sample, first, second)
            for sample, first, second in pairs
            if (sample.id, first, second) not in known
        ]
        answers = make_teacher(config.teacher, config.endpoint).ratings(todo) if todo else ()
        for done, answer in enumerate(answers, start=1):
            request = todo[answer.position]
            pair = {
                "sample_id": request.sample.id,
                "first": request.first,
                "second": request.second,
            }
            if answer.found is not None:
                journal.append(LabelledPair(**pair, rating=answer.found))
            elif answer.is_unusable:
                journal.append(Unusable(**pair, problem=str(answer.problem)))
            else:
                faults.append(str(answer.problem))
            machine.progress(done, len(todo))
        records = journal.records()
    rated = sorted(
        (record for record in records if isinstance(record, LabelledPair)),
        key=lambda pair: (pair.sample_id, pair.first, pair.second),
    )
    problems = Counter(
        [*faults, *(record.problem for record in records if isinstance(record, Unusable))]
    )
    write_records(out / "labelled_pairs.jsonl", LabelledPair, rated)
    counts = {level: sum(pair.rating == level for pair in rated) for level in range(1, 6)}
    return folder.finish({"pairs": len(rated), "ratings": counts, "problems": problems})


def _some_pairs(record: CandidateSet, count: int, seed: int) -> list[tuple[str, str]]:
    """Unordered pairs of a set in an order that the seed gives; which comes first, too."""
    keyed = []
    for number, first in enumerate(record.candidates):
        for second in record.candidates[number + 1 :]:
            key = stable_hash(f"{seed}/{first.id}/{second.id}")
            keyed.append((key, first.text, second.text))
    return _first(keyed, count)


def _some_references(
    record: CandidateSet, sample: Sample, count: int, seed: int
) -> list[tuple[str, str]]:
    """Pairs of a candidate and the reference response, unless that is a candidate itself."""
    reference = scoring.reference_response(sample)
    if reference is None or any(words(each.text) == words(reference) for each in record.candidates):
        return []
    keyed = [
        (stable_hash(f"{seed}/{each.id}/{REFERENCE}"), each.text, reference)
        for each in record.candidates
    ]
    return _first(keyed, count)


def _first(keyed: list[tuple[int, str, str]], count: int) -> list[tuple[str, str]]:
    """The pairs with the lowest keys; the key also decides which response comes first."""
    return [
        (first, second) if key % 2 else (second, first)
        for key, first, second in sorted(keyed)[:count]
    ]


def train_scorer(
    config: ScorerConfig,
    *,
    model: TextModelConfig,
    data: Path,
    annotation: AnnotationConfig,
    labelled_pairs: Path,
    out: Path,
    seed: int,
    rationales: Path | None = None,
    machine: Machine = Machine(),
) -> Figures:
    """Trains R-Scorer on teacher ratings and validates it on samples it was not trained on.

    Args:
        config: The training's settings.
        model: The text-only base model.
        data: The train split.
        annotation: The annotation's settings: the share of the samples that is held back.
        labelled_pairs: The folder of `annotate_ratings`.
        out: Where ``model/`` is written.
        seed: The run's seed.
        rationales: The folder of `augment_rationales` on the train split.
        machine: How the work is done; progress counts optimiser steps.

    Returns:
        Steps and losses, and the scorer's health on the validation pairs.
    """
    from srccore.models.policy import pinned
    from srccore.stages.trained import figures_and_work, free_training_memory
    from srccore.training.scorer import RatingExample
    from srccore.training.scorer import train_scorer as train

    folder = StageFolder(
        "train-scorer",
        out,
        config=config,
        inputs={"data": data, "labelled_pairs": labelled_pairs, "rationales": rationales},
        sources={"model": identify.checkpoint(model.path)},
        settings={
            "seed": seed,
            "validation_share": annotation.validation_share,
            "model": model.model_dump(mode="json"),
        },
    )
    if folder.figures is not None:
        return folder.figures
    pairs = list(read_records(labelled_pairs / "labelled_pairs.jsonl", LabelledPair))
    samples = judged_samples(data, rationales, [pair.sample_id for pair in pairs])
    held = annotation.validation_share
    shares = {"train": 1 - held, "validation": held}
    parts = sampling.split(
        [samples[sample_id] for sample_id in sorted({pair.sample_id for pair in pairs})],
        shares,
        seed,
    )
    held_back = {sample.id for sample in parts["validation"]}
    training = [pair for pair in pairs if pair.sample_id not in held_back]
    validation = [pair for pair in pairs if pair.sample_id in held_back]
    if not training or not validation:
        raise UserError(
            f"{len(pairs)} labelled pairs are too few to train R-Scorer and to validate it.",
            "Annotate more samples (annotation.samples).",
        )
    examples = [
        RatingExample(scoring.rating_prompt(samples[pair.sample_id], first, second), rating)
        for pair in training
        for first, second, rating in (
            (pair.first, pair.second, pair.rating),
            (pair.second, pair.first, 6 - pair.rating),
        )
    ]
    pinned_model = pinned(model)
    outcome = train(pinned_model, examples, config, out, seed=seed, machine=machine)
    figures, work = figures_and_work(outcome)
    if not is_first():
        return figures
    free_training_memory()
    engine = rating_engine(out / "model", machine.device, ScoringConfig().batch_tokens)
    health = scoring.validate(engine, samples, validation)
    return folder.finish(
        {
            **figures,
            "revision": pinned_model.revision,
            "validation": health,
        },
        work,
        gpus=outcome.training.gpus,
    )
