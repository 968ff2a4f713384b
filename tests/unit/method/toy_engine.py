"""A sampling engine whose policy is a table of probabilities, for tests that work by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from srccore.method.engine import Continuation, Draw, Prompt

# The sentences that may follow each prefix, with their probabilities. An answer ends the response.
# Every sentence is one token.
TREE = {
    "": {" red is 3.": 0.6, " blue is 5.": 0.4},
    " red is 3.": {" so seven.": 0.5, "\nAnswer: A": 0.5},
    " blue is 5.": {"\nAnswer: B": 0.9, "\nAnswer: C": 0.1},
    " red is 3. so seven.": {"\nAnswer: D": 1.0},
}


def prompt(key: str) -> Prompt:
    """A prompt whose image is never looked at."""
    return Prompt(lambda: None, "?", key)  # type: ignore[arg-type,return-value]


class ToyEngine:
    """Draws by inverse transform sampling, each draw with its own seed.

    Args:
        tree: The policy.
        in_flight: As in `SamplingEngine`.
        shuffle: Finish a few draws at a time, in an order drawn with this seed; None finishes
            everything at once.
    """

    def __init__(
        self,
        tree: dict[str, dict[str, float]] = TREE,
        *,
        in_flight: int = 1,
        shuffle: int | None = None,
    ) -> None:
        self.in_flight = in_flight
        self.calls: list[int] = []
        self.seeds: list[int] = []
        self.prepared: list[list[str]] = []
        self.opened: list[list[str]] = []
        self._tree = tree
        self._order = None if shuffle is None else random.Random(shuffle)
        self._waiting: dict[int, Draw] = {}

    def prepare(self, prompts: Sequence[Prompt]) -> list[str]:
        self.prepared.append([each.key for each in prompts])
        return self.prepared[-1]

    def open(self, prepared: list[str]) -> list[str]:
        self.opened.append(prepared)
        return [""] * len(prepared)

    def submit(self, draws: Sequence[Draw]) -> list[int]:
        if draws:
            self.calls.append(len(draws))
        tickets = list(range(len(self.seeds), len(self.seeds) + len(draws)))
        self.seeds += [draw.seed for draw in draws]
        self._waiting.update(zip(tickets, draws, strict=True))
        return tickets

    def finished(self) -> list[tuple[int, Continuation]]:
        tickets = list(self._waiting)
        if self._order is not None and tickets:
            tickets = self._order.sample(tickets, self._order.randint(1, len(tickets)))
        return [(ticket, self._draw(self._waiting.pop(ticket))) for ticket in tickets]

    def _draw(self, draw: Draw) -> Continuation:
        rng = np.random.Generator(np.random.Philox(key=draw.seed))
        prefix, text, tokens, score = draw.node, "", 0, 0.0
        while True:
            options = self._tree[prefix + text]
            heights = np.cumsum(list(options.values()))
            sentence = list(options)[int(np.searchsorted(heights, rng.random() * heights[-1]))]
            score += math.log(options[sentence])
            text, tokens = text + sentence, tokens + 1
            if "Answer" in sentence or "STOP" in sentence:
                return Continuation(text, tokens, score, "end", None)
            if not draw.whole:
                return Continuation(text, tokens, score, "sentence", prefix + text)
