"""One function per stage: all that a container runs.

A stage reads what it is given, writes one output folder and returns its figures; the folder's
manifest comes last. A finished stage of the same inputs is skipped, an unfinished one resumes
from its durable parts (`srccore.stages.folder`). Stages know nothing of each other, of earlier
rounds or of Kubernetes. Only `evaluate` is ever given the held-out split. Where several processes
train together, each has an output folder of its own, and that of the first is the stage's.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from srccore import storage
from srccore.config import (
    AnnotationConfig,
    AugmentationConfig,
    CurationConfig,
    DataConfig,
    DpoConfig,
    EvaluationConfig,
    ModelConfig,
    RationaleTuningConfig,
    ScorerConfig,
    ScoringConfig,
    SearchConfig,
    TextModelConfig,
)
from srccore.data import dataset
from srccore.data.records import (
    Candidate,
    CandidateSet,
    Judgement,
    LabelledPair,
    Preference,
    Rating,
    Rationale,
    Record,
    Response,
    Sample,
    read_records,
    write_records,
)
from srccore.errors import UserError
from srccore.files import JOURNAL, STARTED, write_json
from srccore.hashing import stable_hash
from srccore.method import curation, evaluation, response, scoring, search
from srccore.method.engine import Draw, Prompt
from srccore.stages.folder import StageFolder
from srccore.training.ranks import is_first
from srccore.training.resume import Checkpoints

__all__ = [
    "Figures",
    "Progress",
    "annotate_ratings",
    "augment_rationales",
    "curate_preference",
    "evaluate",
    "model_input",
    "prepare_data",
    "read_outcomes",
    "sample_responses",
    "sampling_engine",
    "score_candidates",
    "search_candidates",
    "train_dpo",
    "train_scorer",
    "tune_rationale",
]

Figures = dict[str, Any]
Progress = Callable[[int, int], None]
"""Told how much of the work is done, and how much there is; a skipped stage tells nothing."""

SPLITS = ("train", "calibration", "heldout")
RATIONALES = "rationales.jsonl"
SCORING_CHUNK = 32
"""Samples whose ratings become durable together."""


def _no_progress(_done: int, _total: int) -> None:
    """Says nothing."""


def prepare_data(config: DataConfig, out: Path, progress: Progress = _no_progress) -> Figures:
    """Writes the three splits as Parquet: ``train``, ``calibration`` and ``heldout``.

    Args:
        config: The data's settings.
        out: The output folder.
        progress: Told of samples written.

    Returns:
        How many samples each split holds.
    """
    embedded = config.source == "embedded"
    source = "embedded" if embedded else dataset.open_data(_source(config)).sha256
    folder = StageFolder("prepare-data", out, config=config, inputs={"source": source})
    if folder.figures is not None:
        return folder.figures
    counts = {split: getattr(config, split) for split in SPLITS}
    if embedded:
        rows = {split: _embedded_rows(config, split) for split in SPLITS}
    else:
        rows = _source_rows(config, counts)
    done = 0
    written = {}
    for split in SPLITS:
        written[split] = dataset.write_data(out / f"{split}.parquet", rows[split])
        done += written[split]
        progress(done, sum(counts.values()))
    return folder.finish({"samples": written})


def _source(config: DataConfig) -> Path:
    remote = storage.is_remote(config.source)
    return storage.fetch(config.source) if remote else Path(config.source)


def _embedded_rows(config: DataConfig, split: str) -> Iterator[tuple[Sample, bytes]]:
    from srccore.embedded.world import make_item

    for number in range(getattr(config, split)):
        item = make_item(config.seed, split, number)
        buffer = io.BytesIO()
        item.image.save(buffer, "PNG")
        yield item.sample, buffer.getvalue()


def _source_rows(
    config: DataConfig, counts: dict[str, int]
) -> dict[str, Iterator[tuple[Sample, bytes]]]:
    data = dataset.open_data(_source(config))
    total = sum(counts.values())
    shares = {split: count / total for split, count in counts.items()}
    parts = dataset.split(data.samples, shares, config.seed)

    def rows(split: str) -> Iterator[tuple[Sample, bytes]]:
        part = parts[split]
        wanted = dataset.draw(part, min(counts[split], len(part)), seed=config.seed)
        for sample in wanted:
            yield sample, data.encoded(sample.id)

    return {split: rows(split) for split in SPLITS}


def augment_rationales(
    config: AugmentationConfig, *, data: Path, out: Path, progress: Progress = _no_progress
) -> Figures:
    """Gives a reference rationale to every sample that has none.

    Args:
        config: The teacher.
        data: The train or the calibration split.
        out: Gets ``rationales.jsonl``.
        progress: Told of samples asked.

    Returns:
        How many rationales were there, were made, and failed, by reason.
    """
    from srccore.models.teacher import RationaleRequest, make_teacher

    folder = StageFolder("augment-rationales", out, config=config, inputs={"data": data})
    if folder.figures is not None:
        return folder.figures
    opened = dataset.open_data(data)
    given = [
        Rationale(sample_id=sample.id, rationale=sample.rationale)
        for sample in opened.samples
        if sample.rationale
    ]
    wanting = [sample for sample in opened.samples if not sample.rationale]
    journal = _Journal(out, Rationale)
    known = {record.sample_id for record in journal.records()}
    asked = [
        RationaleRequest(sample, functools.partial(opened.image, sample.id))
        for sample in wanting
        if sample.id not in known
    ]
    problems: dict[str, int] = {}
    answers = make_teacher(config.teacher, config.endpoint).rationales(asked) if asked else ()
    for done, (sample_id, text, problem) in enumerate(answers, start=1):
        if text:
            journal.append(Rationale(sample_id=sample_id, rationale=text))
        else:
            problems[str(problem)] = problems.get(str(problem), 0) + 1
        progress(done, len(asked))
    made = sorted(journal.records(), key=lambda record: record.sample_id)
    write_records(out / RATIONALES, Rationale, [*given, *made])
    progress(len(opened.samples), len(opened.samples))
    figures = folder.finish({"given": len(given), "made": len(made), "problems": problems})
    journal.delete()
    return figures


def tune_rationale(
    config: RationaleTuningConfig,
    *,
    model: ModelConfig,
    data: Path,
    out: Path,
    seed: int,
    rationales: Path | None = None,
    device: str = "auto",
    progress: Progress = _no_progress,
    checkpoints: Checkpoints | None = None,
) -> Figures:
    """Stage 1: teaches the model to write a rationale before the answer (paper: LoRA SFT).

    Args:
        config: The training's settings.
        model: The base model.
        data: The train split.
        out: Gets ``policy.json`` and the adapter.
        seed: The run's seed.
        rationales: The folder of `augment_rationales` on that split; without it, samples that
            have no rationale of their own are left out.
        device: ``cpu``, ``cuda`` or ``auto``.
        progress: Told of optimiser steps.
        checkpoints: Where its states are kept while it trains; None is ``out/checkpoint``.

    Returns:
        Steps, losses and how many samples were used.
    """
    from srccore.models.policy import Policy, write_policy
    from srccore.training.rationale import RationaleExample
    from srccore.training.rationale import tune_rationale as train

    folder = StageFolder(
        "tune-rationale",
        out,
        config=config,
        inputs={
            "model": model_input(model.path),
            "data": data,
            "rationales": rationales,
        },
        settings={"seed": seed, "model": model.model_dump(mode="json")},
    )
    if folder.figures is not None:
        return folder.figures
    opened = dataset.open_data(data)
    texts = _rationale_texts(opened.samples, rationales)
    usable = [sample for sample in opened.samples if sample.id in texts]
    if not usable:
        raise UserError(
            f"No sample of {data} has a rationale.",
            "See the problems of augment-rationales, or run it if it was left out.",
        )
    drawn = dataset.draw(usable, min(config.samples, len(usable)), seed=seed)
    examples = [
        RationaleExample(
            question=sample.question,
            response=response.write(texts[sample.id], sample.answer),
            image=functools.partial(opened.image, sample.id),
        )
        for sample in drawn
    ]
    start = Policy(base=model)
    outcome = train(
        start,
        examples,
        config,
        out,
        seed=seed,
        device=_device(device),
        progress=progress,
        checkpoints=checkpoints,
    )
    if not is_first():
        return dataclasses.asdict(outcome)
    write_policy(out, start.with_adapter(out / "adapter"))
    return folder.finish(dataclasses.asdict(outcome))


def search_candidates(
    config: SearchConfig,
    *,
    data: Path,
    policy: Path,
    out: Path,
    seed: int,
    round_number: int,
    shard: tuple[int, int] = (0, 1),
    device: str = "auto",
    progress: Progress = _no_progress,
) -> Figures:
    """Stage 2: searches candidate responses for a round's samples, or for one shard of them.

    Args:
        config: The search's settings.
        data: The split to draw the round's samples from.
        policy: A ``policy.json``.
        out: Gets ``candidates.jsonl``.
        seed: The run's seed.
        round_number: 1 for the first round; 0 for R-Scorer's training.
        shard: Index and count of the shards of the round's samples.
        device: ``cpu``, ``cuda`` or ``auto``.
        progress: Told of samples searched.

    Returns:
        Counts of samples, candidates, samples with fewer than two, and dropped beams.
    """
    folder = StageFolder(
        "search-candidates",
        out,
        config=config,
        inputs={"data": data, **_policy_inputs(policy)},
        settings={"seed": seed, "round": round_number, "shard": list(shard)},
    )
    if folder.figures is not None:
        return folder.figures
    opened = dataset.open_data(data)
    start = max(0, round_number - 1)
    drawn = dataset.draw(opened.samples, config.samples, seed=seed, start=start)
    samples = dataset.shard(drawn, *shard)
    journal = _Journal(out, CandidateSet)
    known = {record.sample_id for record in journal.records()}
    # Prompts of like length share a batch; the id makes the order the same everywhere.
    todo = sorted(
        (sample for sample in samples if sample.id not in known),
        key=lambda sample: (len(sample.question), sample.id),
    )
    if todo:
        engine = sampling_engine(policy, device)
    for done in range(0, len(todo), config.batch_size):
        batch = todo[done : done + config.batch_size]
        prompts = [
            (sample.id, Prompt(opened.image(sample.id), sample.question)) for sample in batch
        ]
        found = search.search_candidates(
            engine, prompts, config, seed=seed, round_number=round_number
        )
        journal.append(*found)
        progress(len(known) + done + len(batch), len(samples))
    sets = {record.sample_id: record for record in journal.records()}
    ordered = [sets[sample.id] for sample in samples]
    write_records(out / "candidates.jsonl", CandidateSet, ordered)
    figures = folder.finish(
        {
            "samples": len(ordered),
            "candidates": sum(len(record.candidates) for record in ordered),
            "fewer_than_two": sum(len(record.candidates) < 2 for record in ordered),
            "unfinished": sum(record.unfinished for record in ordered),
        }
    )
    journal.delete()
    return figures


def sample_responses(
    config: SearchConfig,
    *,
    annotation: AnnotationConfig,
    data: Path,
    policy: Path,
    out: Path,
    seed: int,
    device: str = "auto",
    progress: Progress = _no_progress,
) -> Figures:
    """Samples whole responses, for a teacher to rate and R-Scorer to learn from.

    Args:
        config: The search's settings; strategy, counts and temperature are the annotation's.
        annotation: The annotation's settings.
        data: The train split.
        policy: A ``policy.json``.
        out: Gets ``candidates.jsonl``.
        seed: The run's seed.
        device: ``cpu``, ``cuda`` or ``auto``.
        progress: Told of samples done.

    Returns:
        As `search_candidates`.
    """
    sampling = config.model_copy(
        update={
            "strategy": "sample",
            "samples": annotation.samples,
            "candidates": annotation.candidates,
            "temperature": annotation.temperature,
        }
    )
    return search_candidates(
        sampling,
        data=data,
        policy=policy,
        out=out,
        seed=seed,
        round_number=0,
        device=device,
        progress=progress,
    )


def annotate_ratings(
    config: AnnotationConfig,
    *,
    data: Path,
    candidates: Path,
    out: Path,
    seed: int,
    rationales: Path | None = None,
    progress: Progress = _no_progress,
) -> Figures:
    """Has a teacher rate pairs of sampled responses, for R-Scorer to learn from.

    Args:
        config: The teacher, and how many pairs a sample gives.
        data: The train split.
        candidates: The folder of `search_candidates` on that split.
        out: Gets ``labelled_pairs.jsonl``.
        seed: The run's seed; decides which pairs.
        rationales: The folder of `augment_rationales` on that split.
        progress: Told of pairs rated.

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
    samples = _judged_samples(data, rationales, [record.sample_id for record in sets])
    pairs = [
        (samples[record.sample_id], first, second)
        for record in sets
        for first, second in _some_pairs(record, config.pairs, seed)
    ]
    journal = _Journal(out, LabelledPair)
    known = {(pair.sample_id, pair.first, pair.second) for pair in journal.records()}
    todo = [
        PairRequest(sample, first.text, second.text)
        for sample, first, second in pairs
        if (sample.id, first.text, second.text) not in known
    ]
    problems: dict[str, int] = {}
    answers = make_teacher(config.teacher, config.endpoint).ratings(todo) if todo else ()
    for done, (number, rating, problem) in enumerate(answers, start=1):
        request = todo[number]
        if rating is None:
            problems[str(problem)] = problems.get(str(problem), 0) + 1
        else:
            journal.append(
                LabelledPair(
                    sample_id=request.sample.id,
                    first=request.first,
                    second=request.second,
                    rating=rating,
                )
            )
        progress(done, len(todo))
    rated = sorted(journal.records(), key=lambda pair: (pair.sample_id, pair.first, pair.second))
    write_records(out / "labelled_pairs.jsonl", LabelledPair, rated)
    counts = {level: sum(pair.rating == level for pair in rated) for level in range(1, 6)}
    figures = folder.finish({"pairs": len(rated), "ratings": counts, "problems": problems})
    journal.delete()
    return figures


def _some_pairs(record: CandidateSet, count: int, seed: int) -> list[tuple[Candidate, Candidate]]:
    """Unordered pairs of a set in an order that the seed gives; which comes first, too."""
    keyed = []
    for number, first in enumerate(record.candidates):
        for second in record.candidates[number + 1 :]:
            key = stable_hash(f"{seed}/{first.id}/{second.id}")
            keyed.append((key, (first, second) if key % 2 else (second, first)))
    return [pair for _, pair in sorted(keyed, key=lambda entry: entry[0])[:count]]


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
    device: str = "auto",
    progress: Progress = _no_progress,
    checkpoints: Checkpoints | None = None,
) -> Figures:
    """Trains R-Scorer on teacher ratings and validates it on samples it was not trained on.

    Args:
        config: The training's settings.
        model: The text-only base model.
        data: The train split.
        annotation: The annotation's settings: the share of the samples that is held back.
        labelled_pairs: The folder of `annotate_ratings`.
        out: Gets ``model/``.
        seed: The run's seed.
        rationales: The folder of `augment_rationales` on the train split.
        device: ``cpu``, ``cuda`` or ``auto``.
        progress: Told of optimiser steps.
        checkpoints: Where its states are kept while it trains; None is ``out/checkpoint``.

    Returns:
        Steps and losses, and the scorer's health on the validation pairs.
    """
    from srccore.training.scorer import RatingExample
    from srccore.training.scorer import train_scorer as train

    folder = StageFolder(
        "train-scorer",
        out,
        config=config,
        inputs={
            "model": model_input(model.path),
            "data": data,
            "labelled_pairs": labelled_pairs,
            "rationales": rationales,
        },
        settings={
            "seed": seed,
            "validation_share": annotation.validation_share,
            "model": model.model_dump(mode="json"),
        },
    )
    if folder.figures is not None:
        return folder.figures
    pairs = list(read_records(labelled_pairs / "labelled_pairs.jsonl", LabelledPair))
    samples = _judged_samples(data, rationales, [pair.sample_id for pair in pairs])
    held = annotation.validation_share
    shares = {"train": 1 - held, "validation": held}
    parts = dataset.split(
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
    outcome = train(
        model,
        examples,
        config,
        out,
        seed=seed,
        device=_device(device),
        progress=progress,
        checkpoints=checkpoints,
    )
    if not is_first():
        return dataclasses.asdict(outcome)
    engine = _rating_engine(out / "model", device, config.batch_size)
    health = scoring.validate(engine, samples, validation)
    return folder.finish({**dataclasses.asdict(outcome), "validation": health})


def score_candidates(
    config: ScoringConfig,
    *,
    data: Path,
    candidates: Path,
    scorer: Path,
    out: Path,
    rationales: Path | None = None,
    device: str = "auto",
    progress: Progress = _no_progress,
) -> Figures:
    """Stage 3: R-Scorer rates every ordered pair of a sample's candidates.

    Args:
        config: The scoring's settings.
        data: The split that the candidates answer.
        candidates: The folder of `search_candidates`.
        scorer: The folder of `train_scorer`.
        out: Gets ``ratings.jsonl``.
        rationales: The folder of `augment_rationales` on that split.
        device: ``cpu``, ``cuda`` or ``auto``.
        progress: Told of samples scored.

    Returns:
        Counts, mean rating mass and swap consistency.
    """
    folder = StageFolder(
        "score-candidates",
        out,
        config=config,
        inputs={
            "data": data,
            "candidates": candidates,
            "scorer": scorer,
            "rationales": rationales,
        },
    )
    if folder.figures is not None:
        return folder.figures
    sets = [
        record
        for record in read_records(candidates / "candidates.jsonl", CandidateSet)
        if len(record.candidates) > 1
    ]
    samples = _judged_samples(data, rationales, [record.sample_id for record in sets])
    journal = _Journal(out, Rating)
    ratings = {(each.sample_id, each.first, each.second): each for each in journal.records()}
    # An interruption may have cut a sample's ratings in two: then all are made again.
    counts = Counter(sample_id for sample_id, _, _ in ratings)
    known = {
        s.sample_id for s in sets if counts[s.sample_id] == len(scoring.pair_schedule(s.candidates))
    }
    todo = [record for record in sets if record.sample_id not in known]
    if todo:
        engine = _rating_engine(scorer / "model", device, config.batch_size)
    for done in range(0, len(todo), SCORING_CHUNK):
        chunk = todo[done : done + SCORING_CHUNK]
        rated = scoring.rate_candidates(
            engine, [(samples[record.sample_id], record) for record in chunk]
        )
        journal.append(*rated)
        ratings.update({(each.sample_id, each.first, each.second): each for each in rated})
        progress(len(known) + done + len(chunk), len(sets))
    ordered = [
        ratings[record.sample_id, first.id, second.id]
        for record in sets
        for first, second in scoring.pair_schedule(record.candidates)
    ]
    write_records(out / "ratings.jsonl", Rating, ordered)
    figures = folder.finish(
        {
            "samples": len(sets),
            "ratings": len(ordered),
            "rating_mass": scoring.mean_mass(ordered),
            "swap_consistency": scoring.swap_consistency(ordered),
        }
    )
    journal.delete()
    return figures


def curate_preference(
    config: CurationConfig,
    *,
    data: Path,
    candidates: Sequence[Path],
    ratings: Sequence[Path],
    out: Path,
    progress: Progress = _no_progress,
) -> Figures:
    """Stage 4: confidence-weighted preferences from all shards of a round.

    Args:
        config: The curation's settings.
        data: The split that the candidates answer.
        candidates: The folders of `search_candidates`.
        ratings: The folders of `score_candidates`.
        out: Gets ``preferences.jsonl``.
        progress: Told of samples, all at once.

    Returns:
        How many preferences, why samples gave none, and how margins and confidences lie.
    """
    inputs = {
        "data": data,
        **{f"candidates_{number}": path for number, path in enumerate(candidates)},
        **{f"ratings_{number}": path for number, path in enumerate(ratings)},
    }
    folder = StageFolder("curate-preference", out, config=config, inputs=inputs)
    if folder.figures is not None:
        return folder.figures
    sets = [
        record
        for path in candidates
        for record in read_records(path / "candidates.jsonl", CandidateSet)
    ]
    samples = _judged_samples(data, None, [record.sample_id for record in sets])
    rated = [rating for path in ratings for rating in read_records(path / "ratings.jsonl", Rating)]
    # The order of shards must not matter.
    result = curation.curate(
        samples, sorted(sets, key=lambda record: record.sample_id), rated, config
    )
    write_records(out / "preferences.jsonl", Preference, result.preferences)
    progress(len(sets), len(sets))
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
    device: str = "auto",
    progress: Progress = _no_progress,
    checkpoints: Checkpoints | None = None,
) -> Figures:
    """Stage 5: preference fine-tuning of the round's policy (paper: DPO with an SFT term).

    Args:
        config: The training's settings.
        data: The split that the preferences answer.
        preferences: The folder of `curate_preference`.
        policy: The ``policy.json`` of the round's starting policy, which is the reference too.
        out: Gets ``policy.json`` with one adapter more.
        seed: The run's seed.
        device: ``cpu``, ``cuda`` or ``auto``.
        progress: Told of optimiser steps.
        checkpoints: Where its states are kept while it trains; None is ``out/checkpoint``.

    Returns:
        Steps, losses, rewards.
    """
    from srccore.models.policy import read_policy, write_policy
    from srccore.training.dpo import PreferenceExample
    from srccore.training.dpo import train_dpo as train

    folder = StageFolder(
        "train-dpo",
        out,
        config=config,
        inputs={"data": data, "preferences": preferences, **_policy_inputs(policy)},
        settings={"seed": seed},
    )
    if folder.figures is not None:
        return folder.figures
    opened = dataset.open_data(data)
    examples = [
        PreferenceExample(
            question=opened.sample(record.sample_id).question,
            chosen=record.chosen.text,
            rejected=record.rejected.text,
            image=functools.partial(opened.image, record.sample_id),
        )
        for record in read_records(preferences / "preferences.jsonl", Preference)
    ]
    if not examples:
        raise UserError(
            f"{preferences} holds no preference, so there is nothing to align to.",
            "Its manifest counts the reasons. Begin another run with a lower "
            "curation.min_margin, or with more search.samples.",
        )
    start = read_policy(policy)
    outcome = train(
        start,
        examples,
        config,
        out,
        seed=seed,
        device=_device(device),
        progress=progress,
        checkpoints=checkpoints,
    )
    if not is_first():
        return dataclasses.asdict(outcome)
    write_policy(out, start.with_adapter(out / "adapter"))
    return folder.finish(dataclasses.asdict(outcome))


def evaluate(
    config: EvaluationConfig,
    *,
    data: Path,
    policy: Path,
    out: Path,
    seed: int,
    round_number: int,
    previous: Path | None = None,
    device: str = "auto",
    progress: Progress = _no_progress,
) -> Figures:
    """Answers every sample of a split greedily and judges rationale and answer.

    Args:
        config: The evaluation's settings.
        data: The held-out split.
        policy: A ``policy.json``.
        out: Gets ``responses.jsonl``, ``judgements.jsonl`` and ``figures.json``.
        seed: Of the bootstrap.
        round_number: 0 after stage 1, then the rounds.
        previous: The evaluation of the policy before, on the same split.
        device: ``cpu``, ``cuda`` or ``auto``.
        progress: Told of samples answered.

    Returns:
        The figures of `srccore.method.evaluation.Figures`.
    """
    folder = StageFolder(
        "evaluate",
        out,
        config=config,
        inputs={"data": data, "previous": previous, **_policy_inputs(policy)},
        settings={"seed": seed, "round": round_number},
    )
    if folder.figures is not None:
        return folder.figures
    opened = dataset.open_data(data)
    engine = sampling_engine(policy, device)
    order = sorted(opened.samples, key=lambda sample: (len(sample.question), sample.id))
    responses: dict[str, Response] = {}
    for start in range(0, len(order), config.batch_size):
        batch = order[start : start + config.batch_size]
        nodes = engine.open([Prompt(opened.image(s.id), s.question) for s in batch])
        drawn = engine.extend(
            [Draw(node, greedy=True) for node in nodes], max_tokens=config.max_tokens, whole=True
        )
        for sample, continuation in zip(batch, drawn, strict=True):
            responses[sample.id] = Response(
                sample_id=sample.id,
                text=continuation.text.strip(),
                token_count=continuation.token_count,
                finished=continuation.stop == "end",
            )
        progress(start + len(batch), len(order))
    write_records(
        out / "responses.jsonl", Response, [responses[sample.id] for sample in opened.samples]
    )
    journal = _Journal(out, Judgement)
    if config.judge == "endpoint":
        _ask_judge(config, opened, responses, journal, progress)
    judgements = sorted(journal.records(), key=lambda record: record.sample_id)
    write_records(out / "judgements.jsonl", Judgement, judgements)
    outcomes = read_outcomes(opened.samples, out)
    before = read_outcomes(opened.samples, previous) if previous is not None else None
    figures = evaluation.figures(
        outcomes, round=round_number, previous=before, resamples=config.resamples, seed=seed
    ).model_dump(mode="json")
    write_json(out / "figures.json", figures)
    figures = folder.finish(figures)
    journal.delete()
    return figures


def _ask_judge(
    config: EvaluationConfig,
    opened: dataset.DataSet,
    responses: dict[str, Response],
    journal: _Journal[Judgement],
    progress: Progress,
) -> None:
    """Asks of every response whose sample has no facts; what fails stays unjudged."""
    from srccore.models.teacher import EndpointTeacher, JudgeRequest

    known = {record.sample_id for record in journal.records()}
    asked = []
    for sample in opened.samples:
        if sample.facts or sample.id in known:
            continue
        parsed = response.parse(responses[sample.id].text)
        if parsed is not None and parsed.rationale:
            image = functools.partial(opened.image, sample.id)
            asked.append(JudgeRequest(sample, parsed, image))
        else:
            # Where there is no rationale there is nothing to ask: it is wrong.
            journal.append(Judgement(sample_id=sample.id, rationale_right=False, derived_answer=""))
    found = EndpointTeacher(config.endpoint).judgements(asked) if asked else ()
    for done, (_, judgement, _) in enumerate(found, start=1):
        if judgement is not None:
            journal.append(judgement)
        progress(done, len(asked))


def read_outcomes(samples: Sequence[Sample], folder: Path) -> list[evaluation.Outcome]:
    """Judges what a folder of `evaluate` holds.

    Args:
        samples: The split that was evaluated.
        folder: The folder.

    Returns:
        One outcome per sample, in their order.

    Raises:
        UserError: The folder's responses are to other samples.
    """
    responses = read_records(folder / "responses.jsonl", Response)
    judgements = read_records(folder / "judgements.jsonl", Judgement)
    return evaluation.judge_responses(
        samples,
        {record.sample_id: record for record in responses},
        {record.sample_id: record for record in judgements},
    )


def _judged_samples(data: Path, rationales: Path | None, ids: Sequence[str]) -> dict[str, Sample]:
    """Samples by id; one without a rationale of its own gets the teacher's.

    Raises:
        UserError: The data set has no sample of one of the ids.
    """
    opened = dataset.open_data(data)
    samples = [opened.sample(sample_id) for sample_id in ids]
    texts = _rationale_texts(samples, rationales)
    return {s.id: s.model_copy(update={"rationale": texts.get(s.id)}) for s in samples}


def _rationale_texts(samples: Sequence[Sample], rationales: Path | None) -> dict[str, str]:
    """Rationales by sample id: the sample's own, else the one given for it.

    They are given by the folder of `augment_rationales`, or by a data set of the same ids.
    """
    own = {sample.id: sample.rationale for sample in samples if sample.rationale}
    if rationales is None:
        return own
    if (rationales / RATIONALES).is_file():
        made = read_records(rationales / RATIONALES, Rationale)
        return {record.sample_id: record.rationale for record in made} | own
    given = dataset.open_data(rationales).samples
    return {sample.id: sample.rationale for sample in given if sample.rationale} | own


def _policy_inputs(policy: Path) -> dict[str, Path | str]:
    """A stage's policy counts by the stage's manifest, any other by its base and its adapters."""
    from srccore.models.policy import POLICY_FILE, read_policy

    file = policy / POLICY_FILE if policy.is_dir() else policy
    if (file.parent / STARTED).is_file():
        return {"policy": file.parent}
    read = read_policy(file)
    return {
        "base": read.base.model_dump_json(),
        **{
            f"adapter_{number}": storage.fetch(adapter)
            for number, adapter in enumerate(read.adapters)
        },
    }


def model_input(path: str) -> Path | str:
    """What a checkpoint counts by among a stage's inputs.

    Args:
        path: As `srccore.config.TextModelConfig` names it.

    Returns:
        The folder, to count by its content; for one in a bucket a hash of its listing; a hub id
        as it is.
    """
    from srccore.models.policy import resolve_model_path

    if storage.is_remote(path):
        return storage.fingerprint(path)
    found = resolve_model_path(path)
    return Path(found) if Path(found).is_dir() else found


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def sampling_engine(policy: Path, device: str) -> Any:
    """Loads a policy into the engine that samples from it."""
    from srccore.models.policy import load_policy, read_policy
    from srccore.models.transformers import TransformersSamplingEngine

    loaded = load_policy(read_policy(policy), _device(device))
    return TransformersSamplingEngine(loaded.model, loaded.processor)


def _rating_engine(folder: Path, device: str, batch_size: int) -> Any:
    from srccore.models.transformers import TransformersRatingEngine

    return TransformersRatingEngine.load(folder, _device(device), batch_size)


R = TypeVar("R", bound=Record)


class _Journal(Generic[R]):
    """Records that are durable as soon as they are appended; read back by a later attempt."""

    def __init__(self, folder: Path, kind: type[R]) -> None:
        self.path = folder / JOURNAL
        self.kind = kind

    def append(self, *records: R) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(record.model_dump_json() + "\n" for record in records))

    def records(self) -> list[R]:
        """All whole lines; a last line that an interruption cut is not there."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            self.path.write_bytes(whole)
        return [self.kind.model_validate_json(line) for line in whole.split(b"\n")[:-1]]

    def delete(self) -> None:
        """Comes after the manifest: until then the records are the stage's only ones."""
        self.path.unlink(missing_ok=True)
