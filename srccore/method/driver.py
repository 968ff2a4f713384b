"""Runs many searches on one engine, so that the engine never waits for a single search.

A search is a generator (`srccore.method.engine.Steps`): it yields draws and is sent their
continuations. Which draws an engine computes together, and in what order they finish, is up to the
engine: random numbers depend on sample and text.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from srccore.method.engine import Continuation, Draw, Node, Prompt, SamplingEngine, Steps

__all__ = ["Search", "draw_all", "drive"]

R = TypeVar("R")

_PREPARED_PROMPTS = 32
"""Prompts that are prepared ahead, until one batch more is: each holds a decoded image."""
_LOADING = 8
"""Images that are loaded at the same time."""


@dataclass(frozen=True)
class Search(Generic[R]):
    """A prompt, and what to do once it is open."""

    prompt: Prompt
    start: Callable[[Node], Steps[R]]


def drive(engine: SamplingEngine, batches: Iterable[Sequence[Search[R]]]) -> Iterator[list[R]]:
    """Runs searches, as many at a time as the engine takes; prompts are prepared ahead of it.

    Args:
        engine: Continues the policy's responses.
        batches: The searches whose prompts are opened together, read as they are needed. None is
            empty.

    Yields:
        The results of a batch, in its order, as soon as all of them are known.
    """
    open_now = 0
    ready: list[_Running[R]] = []
    asked: dict[int, tuple[_Running[R], int]] = {}
    with contextlib.closing(_Ahead(engine, batches)) as ahead:
        while True:
            while open_now < engine.in_flight:
                # Draws that run already must not wait for a slow image.
                opened = ahead.take(wait=not open_now)
                if opened is None:
                    break
                ready += _start(engine, *opened)
                open_now += 1
            if not open_now:
                return
            draws, places = [], []
            for running in ready:
                if running.advance():
                    draws += running.draws
                    places += [(running, place) for place in range(len(running.draws))]
                elif running.batch.missing == 0:
                    open_now -= 1
                    yield running.batch.in_order()
            asked.update(zip(engine.submit(draws), places, strict=True))
            ready = []
            for ticket, drawn in engine.finished():
                running, place = asked.pop(ticket)
                if running.receive(place, drawn):
                    ready.append(running)


def draw_all(engine: SamplingEngine, draws: Sequence[Draw]) -> list[Continuation]:
    """Makes some draws and waits for all of them: for work that is no search.

    Args:
        engine: Continues the policy's responses.
        draws: What to draw.

    Returns:
        The continuations, in the order of the draws.
    """
    tickets = engine.submit(draws)
    drawn: dict[int, Continuation] = {}
    while len(drawn) < len(tickets):
        drawn.update(engine.finished())
    return [drawn[ticket] for ticket in tickets]


class _Batch(Generic[R]):
    """The results of the prompts that were opened together."""

    def __init__(self, size: int) -> None:
        self.missing = size
        self._results: dict[int, R] = {}

    def add(self, place: int, result: R) -> None:
        self._results[place] = result
        self.missing -= 1

    def in_order(self) -> list[R]:
        return [self._results[place] for place in sorted(self._results)]


class _Running(Generic[R]):
    """An open search, with the draws that it waits for."""

    def __init__(self, steps: Steps[R], batch: _Batch[R], place: int) -> None:
        self.batch = batch
        self.draws: list[Draw] = []
        self._steps = steps
        self._place = place
        self._drawn: dict[int, Continuation] = {}

    def advance(self) -> bool:
        """Hands over what was drawn; returns whether there is more to draw."""
        drawn = [self._drawn[place] for place in range(len(self.draws))]
        self._drawn = {}
        try:
            self.draws = self._steps.send(drawn) if drawn else next(self._steps)
        except StopIteration as end:
            self.draws = []
            self.batch.add(self._place, end.value)
            return False
        return True

    def receive(self, place: int, drawn: Continuation) -> bool:
        """Returns whether all draws are finished."""
        self._drawn[place] = drawn
        return len(self._drawn) == len(self.draws)


def _start(
    engine: SamplingEngine, searches: Sequence[Search[R]], prepared: Any
) -> list[_Running[R]]:
    batch: _Batch[R] = _Batch(len(searches))
    nodes = engine.open(prepared)
    return [
        _Running(search.start(node), batch, place)
        for place, (search, node) in enumerate(zip(searches, nodes, strict=True))
    ]


class _Ahead(Generic[R]):
    """Prepares batches ahead of the engine: several threads load images, and one prepares prompts.

    An image in a bucket takes tens of milliseconds to arrive, most of them waiting.
    """

    def __init__(self, engine: SamplingEngine, batches: Iterable[Sequence[Search[R]]]) -> None:
        self._engine = engine
        self._remaining = iter(batches)
        self._ahead: deque[tuple[Sequence[Search[R]], Future[Any]]] = deque()
        self._loading = ThreadPoolExecutor(_LOADING, thread_name_prefix="load")
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    def take(self, *, wait: bool) -> tuple[Sequence[Search[R]], Any] | None:
        """Returns the next batch and what the engine has prepared.

        Args:
            wait: Whether to wait for it.

        Returns:
            None if there is none, or if it is not prepared yet.
        """
        while sum(len(together) for together, _ in self._ahead) < _PREPARED_PROMPTS:
            together = next(self._remaining, None)
            if together is None:
                break
            self._ahead.append((together, self._prepare(together)))
        if not self._ahead or not (wait or self._ahead[0][1].done()):
            return None
        together, prepared = self._ahead.popleft()
        return together, prepared.result()

    def _prepare(self, together: Sequence[Search[R]]) -> Future[Any]:
        prompts = [
            replace(search.prompt, image=self._loading.submit(search.prompt.image).result)
            for search in together
        ]
        return self._preparing.submit(self._engine.prepare, prompts)

    def close(self) -> None:
        """Ends the threads."""
        for pool in (self._loading, self._preparing):
            pool.shutdown(cancel_futures=True)
