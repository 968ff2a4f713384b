"""Stages sample-responses, search-candidates and score-candidates."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence, Set
from contextlib import closing
from functools import partial
from pathlib import Path

from srccore.config import AnnotationConfig, ScoringConfig, SearchConfig
from srccore.data import sampling
from srccore.data.dataset import DataSet
from srccore.data.records import CandidateSet, Rating, Sample, Unrated, read_records, write_records
from srccore.method import scoring, search
from srccore.method.driver import Search, drive
from srccore.method.engine import Work
from srccore.models.engines import rating_engine, sampling_engine
from srccore.stages.batches import prompt_batches, unfinished
from srccore.stages.folder import StageFolder
from srccore.stages.rationales import judged_samples, trained_on
from srccore.stages.splits import open_split, prompt
from srccore.stages.workers import divide, gpus_of
from srccore.training.machine import Figures, Machine

__all__ = ["sample_responses", "score_candidates", "search_candidates"]

SCORING_CHUNK = 32
"""Samples whose ratings become durable together."""


def search_candidates(
    config: SearchConfig,
    *,
    data: Path,
    policy: Path,
    out: Path,
    seed: int,
    round_number: int,
    shard: tuple[int, int] = (0, 1),
    machine: Machine = Machine(),
) -> Figures:
    """Stage 2: searches candidate responses for a round's samples, or for one shard of them.

    Args:
        config: The search's settings.
        data: The split to draw the round's samples from.
        policy: A ``policy.json``.
        out: Where ``candidates.jsonl`` is written.
        seed: The run's seed.
        round_number: 1 for the first round.
        shard: Index and count of the shards of the round's samples.
        machine: How the work is done; progress counts samples searched.

    Returns:
        Counts of samples, candidates, samples with fewer than two, and responses that were
        dropped because they did not finish, or have no rationale or no answer.
    """
    stage = "search-candidates"
    return _search(stage, config, data, policy, out, seed, round_number, shard, machine)


def _search(
    stage: str,
    config: SearchConfig,
    data: Path,
    policy: Path,
    out: Path,
    seed: int,
    round_number: int,
    shard: tuple[int, int],
    machine: Machine,
    *,
    unseen_first: bool = False,
) -> Figures:
    folder = StageFolder(
        stage,
        out,
        config=config,
        inputs={"data": data, "policy": policy},
        settings={"seed": seed, "round": round_number, "shard": list(shard)},
    )
    if folder.figures is not None:
        return folder.figures
    start = max(0, round_number - 1)
    seen = trained_on(policy) if unseen_first else set()
    opened = open_split(data)
    drawn = _draw(list(opened), seen, config.samples, seed, start)
    samples = sampling.shard(drawn, *shard)
    batches = prompt_batches(samples, opened, policy, config.engine, config.batch_tokens)
    work = None
    with folder.journal(machine, CandidateSet) as journal:
        sets = {record.sample_id: record for record in journal.records()}
        if todo := unfinished(batches, lambda sample: sample.id in sets):
            work = Work()
            job = partial(_found, opened, policy, machine.device, config, seed, round_number)
            for found in divide(job, todo, machine.workers, work):
                journal.append(*found)
                sets |= {record.sample_id: record for record in found}
                machine.progress(len(sets), len(samples), work.decoded_tokens)
    ordered = [sets[sample.id] for sample in samples]
    write_records(out / "candidates.jsonl", CandidateSet, ordered)
    seen_again = {"trained_on": sum(s.id in seen for s in samples)} if unseen_first else {}
    return folder.finish(
        {
            **seen_again,
            "samples": len(ordered),
            "candidates": sum(len(record.candidates) for record in ordered),
            "fewer_than_two": sum(len(record.candidates) < 2 for record in ordered),
            "unfinished": sum(record.unfinished for record in ordered),
            "unparsed": sum(record.unparsed for record in ordered),
        },
        work,
        gpus=gpus_of(machine, config.engine),
        elsewhere=machine.leaves_gpu_to_others(config.engine),
    )


def _found(
    data: DataSet,
    policy: Path,
    device: str,
    config: SearchConfig,
    seed: int,
    round_number: int,
    batches: Sequence[Sequence[Sample]],
    work: Work,
) -> Iterator[list[CandidateSet]]:
    """Searches candidates for samples, as a job of one process."""
    at_once = config.width * config.branch if config.strategy == "beam" else config.candidates
    engine = sampling_engine(policy, device, config.engine, draws=at_once)
    searches = (
        [
            Search(
                prompt(data, sample),
                partial(
                    search.search,
                    sample_id=sample.id,
                    config=config,
                    seed=seed,
                    round_number=round_number,
                ),
            )
            for sample in batch
        ]
        for batch in batches
    )
    with closing(engine):
        for found in drive(engine, searches):
            work.add(engine.work.take())
            yield found


def _draw(
    samples: Sequence[Sample], seen: Set[str], count: int, seed: int, start: int
) -> list[Sample]:
    """Draws samples that the policy was not trained on, and others only if these are too few."""
    unseen = [sample for sample in samples if sample.id not in seen]
    drawn = sampling.draw(unseen, count, seed=seed, start=start) if unseen or not seen else []
    if missing := min(count, len(samples)) - len(drawn):
        print(
            f"Only {len(drawn)} of {count} samples are new to the policy, so {missing} that it was "
            "trained on are used, too. R-Scorer learns more from new ones: raise data.train to "
            "rationale.samples + annotation.samples.",
            file=sys.stderr,
        )
        drawn += sampling.draw([s for s in samples if s.id in seen], missing, seed=seed)
    return drawn


def sample_responses(
    config: SearchConfig,
    *,
    annotation: AnnotationConfig,
    data: Path,
    policy: Path,
    out: Path,
    seed: int,
    machine: Machine = Machine(),
) -> Figures:
    """Samples whole responses, for a teacher to rate and R-Scorer to learn from.

    The samples are those that stage 1 has not used: to those it was trained on, the policy gives
    better responses than to the ones that R-Scorer will rate. If there are too few, used ones fill
    up (reconstruction).

    Args:
        config: The search's settings; strategy, counts and temperature are the annotation's.
        annotation: The annotation's settings.
        data: The train split.
        policy: A ``policy.json``.
        out: Where ``candidates.jsonl`` is written.
        seed: The run's seed.
        machine: How the work is done; progress counts samples done.

    Returns:
        As `search_candidates`; ``trained_on`` is the number of samples that stage 1 has used.
    """
    settings = config.model_copy(
        update={
            "strategy": "sample",
            "samples": annotation.samples,
            "candidates": annotation.candidates,
            "temperature": annotation.temperature,
        }
    )
    stage = "sample-responses"
    return _search(stage, settings, data, policy, out, seed, 0, (0, 1), machine, unseen_first=True)


def score_candidates(
    config: ScoringConfig,
    *,
    data: Path,
    candidates: Path,
    scorer: Path,
    out: Path,
    rationales: Path | None = None,
    machine: Machine = Machine(),
) -> Figures:
    """Stage 3: R-Scorer rates every ordered pair of candidates of the samples with a reference.

    Each candidate is also rated against the sample's reference response. Other samples are left
    unrated, unless the settings say otherwise.

    Args:
        config: The scoring's settings.
        data: The split that the candidates answer.
        candidates: The folder of `search_candidates`.
        scorer: The folder of `train_scorer`.
        out: Where ``ratings.jsonl`` and ``unrated.jsonl`` are written.
        rationales: The folder of `augment_rationales` on that split.
        machine: How the work is done; progress counts samples scored.

    Returns:
        Counts, mean rating mass and swap consistency; ``no_reference`` is the number of samples
        without a reference.
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
    several = [
        record
        for record in read_records(candidates / "candidates.jsonl", CandidateSet)
        if len(record.candidates) > 1
    ]
    samples = judged_samples(data, rationales, [record.sample_id for record in several])
    bare = {name for name, each in samples.items() if scoring.reference_rationale(each) is None}
    left_out = bare if config.require_reference else set()
    sets = [record for record in several if record.sample_id not in left_out]
    pairs = [
        (record.sample_id, first.id, second.id)
        for record in sets
        for first, second in scoring.pair_schedule(samples[record.sample_id], record.candidates)
    ]
    given = [(samples[record.sample_id], record) for record in sets]
    chunks = [given[start : start + SCORING_CHUNK] for start in range(0, len(given), SCORING_CHUNK)]
    work = None
    with folder.journal(machine, Rating) as journal:
        ratings = {(each.sample_id, each.first, each.second): each for each in journal.records()}
        # An interruption may have cut a sample's ratings in two.
        missing = {pair[0] for pair in pairs if pair not in ratings}
        known = {record.sample_id for record in sets} - missing
        if todo := unfinished(chunks, lambda each: each[0].id in known):
            work = Work()
            job = partial(_rated, scorer / "model", machine.device, config)
            for rated in divide(job, todo, machine.workers, work):
                journal.append(*rated)
                ratings.update({(each.sample_id, each.first, each.second): each for each in rated})
                known |= {each.sample_id for each in rated}
                machine.progress(len(known), len(sets), work.prefilled_tokens)
    ordered = [ratings[pair] for pair in pairs]
    unrated = [Unrated(sample_id=name) for name in samples if name in left_out]
    write_records(out / "unrated.jsonl", Unrated, unrated)
    write_records(out / "ratings.jsonl", Rating, ordered)
    return folder.finish(
        {
            "samples": len(sets),
            "no_reference": len(bare),
            "ratings": len(ordered),
            "rating_mass": scoring.mean_mass(ordered),
            "swap_consistency": scoring.swap_consistency(ordered),
        },
        work,
        gpus=gpus_of(machine, config.engine),
        elsewhere=machine.leaves_gpu_to_others(config.engine),
    )


def _rated(
    model: Path,
    device: str,
    config: ScoringConfig,
    chunks: Sequence[Sequence[tuple[Sample, CandidateSet]]],
    work: Work,
) -> Iterator[list[Rating]]:
    """Rates the candidates of samples, as a job of one process."""
    engine = rating_engine(model, device, config.batch_tokens, config.engine)
    with closing(engine):
        for chunk in chunks:
            rated = scoring.rate_candidates(engine, chunk)
            work.add(engine.work.take())
            yield rated
