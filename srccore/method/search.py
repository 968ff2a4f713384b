"""Stage 2: sentence-level beam search for candidate responses. Pure, over a `SamplingEngine`.

The paper searches by sentences so that candidates differ in reasoning and not in wording; the
details here are a reconstruction (docs/method.md). Every step extends all live beams of all
samples of a batch by one sentence. Random numbers depend on the seed, the round, the sample and
the text of the beam, never on a batch or a shard.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from srccore.config import SearchConfig
from srccore.data.records import Candidate, CandidateSet
from srccore.hashing import hash_text, stable_hash
from srccore.method.engine import Continuation, Draw, Node, Prompt, SamplingEngine

__all__ = ["Beam", "candidate_id", "search_candidates", "select", "similarity"]

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Beam:
    """A response so far."""

    text: str
    log_probability: float
    """Sum over its tokens, natural log."""
    token_count: int
    node: Node = None
    is_finished: bool = False
    parent_length: int = 0
    """Length of its parent's text in characters: siblings share that part."""

    @property
    def rank(self) -> tuple[float, int]:
        """Sort key, best first: length-normalised log-probability, ties by the text's hash."""
        return (-self.log_probability / max(1, self.token_count), stable_hash(self.text))

    def extended(self, drawn: Continuation) -> Beam:
        """Returns this beam with a continuation appended."""
        return Beam(
            text=self.text + drawn.text,
            log_probability=self.log_probability + drawn.log_probability,
            token_count=self.token_count + drawn.token_count,
            node=drawn.node,
            is_finished=drawn.stop == "end",
            parent_length=len(self.text),
        )


def search_candidates(
    engine: SamplingEngine,
    prompts: Sequence[tuple[str, Prompt]],
    config: SearchConfig,
    *,
    seed: int,
    round_number: int,
) -> list[CandidateSet]:
    """Searches candidates for a batch of samples.

    Args:
        engine: Continues the policy's responses.
        prompts: Sample ids with their prompts; they share the engine's batches.
        config: The search's settings.
        seed: The run's seed.
        round_number: The round; each round draws different random numbers.

    Returns:
        A set per sample, in the order of ``prompts``, with the best candidate first. A set may
        have fewer than ``config.candidates``.
    """
    roots = engine.open([prompt for _, prompt in prompts])
    searches = [
        _Search(f"{seed}/{round_number}/{sample_id}", Beam("", 0.0, 0, root))
        for (sample_id, _), root in zip(prompts, roots, strict=True)
    ]
    run = _sample if config.strategy == "sample" else _search_beams
    run(engine, searches, config)
    return [
        search.result(sample_id, config.candidates)
        for (sample_id, _), search in zip(prompts, searches, strict=True)
    ]


class _Search:
    """The state of one sample's search: live beams and the pool of finished ones."""

    def __init__(self, key: str, root: Beam) -> None:
        self.key = key
        self.live = [root]
        self.pool: dict[str, Beam] = {}
        self.unfinished = 0

    def draws(self, count: int, temperature: float) -> list[tuple[Beam, Draw]]:
        """Makes ``count`` draws from each live beam."""
        return [
            (beam, Draw(beam.node, stable_hash(f"{self.key}/{number}/{beam.text}"), temperature))
            for beam in self.live
            for number in range(count)
        ]

    def finish(self, beam: Beam) -> None:
        """Adds a finished beam to the pool; an empty response counts as unfinished."""
        text = beam.text.strip()
        if not text:
            self.unfinished += 1
        elif text not in self.pool or beam.rank < self.pool[text].rank:
            self.pool[text] = beam

    def result(self, sample_id: str, count: int) -> CandidateSet:
        best = sorted(self.pool.items(), key=lambda entry: entry[1].rank)[:count]
        candidates = (
            Candidate(
                id=candidate_id(sample_id, text),
                text=text,
                log_probability=beam.log_probability,
                token_count=beam.token_count,
            )
            for text, beam in best
        )
        return CandidateSet(
            sample_id=sample_id, candidates=tuple(candidates), unfinished=self.unfinished
        )


def _search_beams(engine: SamplingEngine, searches: list[_Search], config: SearchConfig) -> None:
    for sentence in range(config.max_sentences):
        active = [search for search in searches if search.live]
        count = config.branch if sentence else config.width * config.branch
        families = _draw(engine, active, config, count=count)
        for search, children in zip(active, families, strict=True):
            kept = select(children, config)
            for beam in kept:
                if beam.is_finished:
                    search.finish(beam)
            search.live = [beam for beam in kept if not beam.is_finished]
            if len(search.pool) >= config.candidates:
                search.live = []
    _draw_to_the_end(engine, searches, config, count=1)


def _sample(engine: SamplingEngine, searches: list[_Search], config: SearchConfig) -> None:
    _draw_to_the_end(engine, searches, config, count=config.candidates)


def _draw_to_the_end(
    engine: SamplingEngine, searches: list[_Search], config: SearchConfig, count: int
) -> None:
    active = [search for search in searches if search.live]
    families = _draw(engine, active, config, count=count, whole=True)
    for search, children in zip(active, families, strict=True):
        for family in children:
            for beam in family:
                if beam.is_finished:
                    search.finish(beam)
                else:
                    search.unfinished += 1
        search.live = []


def _draw(
    engine: SamplingEngine,
    searches: list[_Search],
    config: SearchConfig,
    *,
    count: int,
    whole: bool = False,
) -> list[list[list[Beam]]]:
    """Draws from all live beams of all searches at once; returns children by search and parent."""
    planned = [search.draws(count, config.temperature) for search in searches]
    draws = [draw for plan in planned for _, draw in plan]
    if not draws:
        return [[] for _ in searches]
    sentences = config.max_sentences if whole else 1
    drawn = iter(
        engine.extend(draws, max_tokens=config.max_sentence_tokens * sentences, whole=whole)
    )
    return [
        [
            [beam.extended(next(drawn)) for beam, _ in plan[start : start + count]]
            for start in range(0, len(plan), count)
        ]
        for plan in planned
    ]


def select(families: Sequence[Sequence[Beam]], config: SearchConfig) -> list[Beam]:
    """Chooses the beams to keep after a step.

    Of near-identical siblings only the best survives. Of the survivors the first
    ``width - diverse`` by rank are kept, then, ``diverse`` times, the one whose greatest
    similarity to any kept beam is smallest.

    Args:
        families: The children of each parent.
        config: The search's settings.

    Returns:
        At most ``config.width`` beams, with distinct texts.
    """
    survivors: dict[str, Beam] = {}
    for siblings in families:
        distinct: list[Beam] = []
        for beam in sorted(siblings, key=lambda beam: beam.rank):
            if not _is_near(beam, distinct, config.similarity):
                distinct.append(beam)
        survivors.update({beam.text: beam for beam in distinct})
    ranked = sorted(survivors.values(), key=lambda beam: beam.rank)
    kept = ranked[: config.width - config.diverse]
    rest = ranked[len(kept) :]
    while rest and len(kept) < config.width:
        most_different = min(
            rest,
            key=lambda beam: (
                max((similarity(beam.text, other.text) for other in kept), default=0.0),
                beam.rank,
            ),
        )
        rest.remove(most_different)
        kept.append(most_different)
    return kept


def _is_near(beam: Beam, kept: Sequence[Beam], limit: float) -> bool:
    """Whether the text that a beam adds to its parent is similar to what a sibling adds.

    The parent's text is ignored: after a long one, right and wrong conclusions would be similar.
    A finished and a live beam are never the same response, however similar they are.
    """
    added = beam.text[beam.parent_length :]
    return any(
        beam.is_finished == other.is_finished
        and similarity(added, other.text[other.parent_length :]) >= limit
        for other in kept
    )


def similarity(first: str, second: str) -> float:
    """Computes the Jaccard index of two texts' word sets; 1 for two texts without words.

    Args:
        first: A text.
        second: A text.

    Returns:
        A number between 0 (no shared word) and 1.
    """
    left, right = (set(_WORD.findall(text.casefold())) for text in (first, second))
    return len(left & right) / len(left | right) if left | right else 1.0


def candidate_id(sample_id: str, text: str) -> str:
    """Returns the id of a candidate: the same text for the same sample always has the same id."""
    return hash_text(f"{sample_id}\n{text}")[:16]
