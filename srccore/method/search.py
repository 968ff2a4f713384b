"""Stage 2: sentence-level beam search for candidate responses. Pure: it yields what to draw.

The paper searches by sentences so that candidates differ in reasoning and not in wording; the
details here are a reconstruction (docs/method.md). Every step extends all live beams of a sample
by one sentence. Random numbers depend on the seed, the round, the sample and the text of the beam,
never on a batch, a shard or the order in which an engine finishes draws.

A candidate has a rationale and an answer. Other finished responses, such as a bare answer, are
counted and take no place among the beams or in the pool: rated as candidates, they would lose to
any rationale, and training on them would teach the form of a response and not its reasoning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from srccore.config import SearchConfig
from srccore.data.records import Candidate, CandidateSet
from srccore.hashing import hash_text, stable_hash
from srccore.method.duplicates import is_duplicate, words
from srccore.method.engine import Continuation, Draw, Node, Steps
from srccore.method.response import has_rationale

__all__ = ["Beam", "candidate_id", "search", "select", "similarity"]


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


def search(
    root: Node, *, sample_id: str, config: SearchConfig, seed: int, round_number: int
) -> Steps[CandidateSet]:
    """Searches candidates for one sample; for `srccore.method.driver.drive`.

    Args:
        root: The sample's prompt, in an engine.
        sample_id: The sample.
        config: The search's settings.
        seed: The run's seed.
        round_number: The round; each round draws different random numbers.

    Yields:
        The draws of a step: a sentence for every live beam, or whole responses at the end.

    Returns:
        The candidates, the best first. There may be fewer than ``config.candidates``.
    """
    state = _Search(f"{seed}/{round_number}/{sample_id}", Beam("", 0.0, 0, root), config)
    if config.strategy == "beam":
        yield from _search_beams(state)
    yield from _fill(state)
    return state.result(sample_id)


class _Search:
    """The state of one sample's search: live beams and the pool of candidates."""

    def __init__(self, key: str, root: Beam, config: SearchConfig) -> None:
        self.key = key
        self.root = root
        self.config = config
        self.live = [root]
        self.pool: dict[str, Beam] = {}
        self.drawn: Counter[str] = Counter()
        self.unfinished = 0
        self.unparsed = 0

    def draw(self, count: int, *, whole: bool = False) -> Steps[list[list[Beam]]]:
        """Makes ``count`` draws from each live beam; further ones get other random numbers.

        Returns:
            The children of each live beam.
        """
        config = self.config
        limit = config.max_sentence_tokens * (config.max_sentences if whole else 1)
        draws = []
        for beam in self.live:
            start = self.drawn[beam.text]
            self.drawn[beam.text] += count
            seeds = [f"{self.key}/{start + number}/{beam.text}" for number in range(count)]
            draws += [
                Draw(beam.node, limit, stable_hash(seed), config.temperature, whole=whole)
                for seed in seeds
            ]
        drawn = iter((yield draws))
        return [[beam.extended(next(drawn)) for _ in range(count)] for beam in self.live]

    def usable(self, beams: Sequence[Beam]) -> list[Beam]:
        """Leaves out finished responses that are no candidates, and counts them."""
        found = [beam for beam in beams if not beam.is_finished or has_rationale(beam.text)]
        self.unparsed += len(beams) - len(found)
        return found

    def finish(self, beam: Beam) -> None:
        """Adds a finished beam to the pool; of texts with the same words the best counts."""
        key = " ".join(words(beam.text))
        if key not in self.pool or beam.rank < self.pool[key].rank:
            self.pool[key] = beam

    def result(self, sample_id: str) -> CandidateSet:
        best = sorted(self.pool.values(), key=lambda beam: beam.rank)[: self.config.candidates]
        candidates = (
            Candidate(
                id=candidate_id(sample_id, beam.text.strip()),
                text=beam.text.strip(),
                drawn=beam.text,
                log_probability=beam.log_probability,
                token_count=beam.token_count,
            )
            for beam in best
        )
        return CandidateSet(
            sample_id=sample_id,
            candidates=tuple(candidates),
            unfinished=self.unfinished,
            unparsed=self.unparsed,
        )


def _search_beams(state: _Search) -> Steps[None]:
    config = state.config
    for sentence in range(config.max_sentences):
        if not state.live:
            return
        count = config.branch if sentence else config.width * config.branch
        families = yield from state.draw(count)
        kept = select([state.usable(family) for family in families], config)
        for beam in kept:
            if beam.is_finished:
                state.finish(beam)
        state.live = [beam for beam in kept if not beam.is_finished]
        if len(state.pool) >= config.candidates:
            state.live = []
    yield from _draw_to_the_end(state, count=1)


def _fill(state: _Search) -> Steps[None]:
    """Draws whole responses if there are too few candidates."""
    for _ in range(state.config.fill_attempts):
        if len(state.pool) >= state.config.candidates:
            return
        state.live = [state.root]
        yield from _draw_to_the_end(state, count=state.config.candidates)


def _draw_to_the_end(state: _Search, count: int) -> Steps[None]:
    if not state.live:
        return
    families = yield from state.draw(count, whole=True)
    for beam in (beam for family in families for beam in state.usable(family)):
        if beam.is_finished:
            state.finish(beam)
        else:
            state.unfinished += 1
    state.live = []


def select(families: Sequence[Sequence[Beam]], config: SearchConfig) -> list[Beam]:
    """Chooses the beams to keep after a step.

    Of siblings that say the same only the best survives. Of the survivors the first
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
            if not _says_the_same(beam, distinct, config.similarity):
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


def _says_the_same(beam: Beam, kept: Sequence[Beam], limit: float) -> bool:
    """Whether the text that a beam adds to its parent is a duplicate of what a sibling adds.

    The parent's text is the same. A finished and a live beam are never the same response, however
    similar they are.
    """
    added = beam.text[beam.parent_length :]
    return any(
        beam.is_finished == other.is_finished
        and is_duplicate(added, other.text[other.parent_length :], limit)
        for other in kept
    )


def similarity(first: str, second: str) -> float:
    """Computes the Jaccard index of two texts' word sets, by which the diverse beams are chosen.

    It only orders beams that all say different things (see `is_duplicate`), so that it ignores the
    order of words does no harm; it costs little for long texts.

    Args:
        first: A text.
        second: A text.

    Returns:
        A number between 0 (no shared word) and 1; 1 for two texts without words.
    """
    left, right = set(words(first)), set(words(second))
    return len(left & right) / len(left | right) if left | right else 1.0


def candidate_id(sample_id: str, text: str) -> str:
    """Returns the id of a candidate: the same text for the same sample always has the same id."""
    return hash_text(f"{sample_id}\n{text}")[:16]
