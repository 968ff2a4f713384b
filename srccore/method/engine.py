"""What the search and the scorer require of an engine, and nothing more.

A `SamplingEngine` continues responses sentence by sentence and keeps its caches behind opaque
nodes; releasing a node frees them. A `RatingEngine` reads the distribution over a few tokens
after a prompt. An engine without caches may encode the prefix again behind the same interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Continuation", "Draw", "Prompt", "RatingEngine", "SamplingEngine", "TokenDistribution"]

Node = Any
"""An engine's handle for a prefix: image, prompt and the response so far."""


@dataclass(frozen=True)
class Prompt:
    """An image and a question, as a policy sees them."""

    image: Image
    question: str


@dataclass(frozen=True)
class Draw:
    """One continuation to draw from a node.

    Its random numbers depend only on ``seed``, wherever in a batch it ends up. ``greedy`` takes
    the most likely token instead.
    """

    node: Node
    seed: int = 0
    temperature: float = 1.0
    greedy: bool = False


@dataclass(frozen=True)
class Continuation:
    """What was drawn: text up to the stop, its length and its log-probability at temperature 1."""

    text: str
    token_count: int
    log_probability: float
    stop: Literal["sentence", "end", "length"]
    node: Node
    """The prefix with this continuation; None after the end of a response."""


@dataclass(frozen=True)
class TokenDistribution:
    """Probabilities of the requested tokens, renormalised, and their share of the full softmax."""

    probabilities: tuple[float, ...]
    mass: float


class SamplingEngine(Protocol):
    """Continues responses of a policy."""

    def open(self, prompts: Sequence[Prompt]) -> list[Node]:
        """Encodes images and prompts, each once, and returns a node for each prompt."""
        ...

    def extend(
        self, draws: Sequence[Draw], *, max_tokens: int, whole: bool = False
    ) -> list[Continuation]:
        """Draws one continuation per draw, to the next sentence end or the end of the response.

        Args:
            draws: What to draw; several may share a node.
            max_tokens: The maximum number of tokens in one continuation.
            whole: Do not stop at sentence ends.
        """
        ...


class RatingEngine(Protocol):
    """Reads what a text model expects to come next."""

    def next_token_distribution(
        self, prompts: Sequence[str], tokens: Sequence[str]
    ) -> list[TokenDistribution]:
        """Reads the distribution over ``tokens`` after each prompt; generates nothing."""
        ...
