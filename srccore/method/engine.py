"""What the search and the scorer require of an engine, and nothing more.

A `SamplingEngine` continues responses, to the end of a sentence or of the response, and keeps its
caches behind opaque nodes; dropping the last reference to a node frees them. It takes draws and
finishes them in any order (`srccore.method.driver` brings them back to the searches that asked). A
`RatingEngine` reads the distribution over a few tokens after a prompt. An engine without caches may
encode the prefix again behind the same interface.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Continuation",
    "Draw",
    "Prompt",
    "RatingEngine",
    "SamplingEngine",
    "Steps",
    "TokenDistribution",
    "Work",
]

Node = Any
"""An engine's handle for a prefix: image, prompt and the response so far."""


@dataclass(frozen=True)
class Prompt:
    """An image and a question, as a policy sees them."""

    image: Callable[[], Image]
    """Loads the image. Thousands of prompts may wait for their turn, their images do not."""
    question: str
    key: str
    """Identifies the image to an engine's caches: prompts with the same key have the same image."""


@dataclass(frozen=True)
class Draw:
    """One continuation to draw from a node.

    Its random numbers depend only on ``seed``, wherever in a batch it ends up.
    """

    node: Node
    max_tokens: int
    """The maximum number of tokens of this continuation."""
    seed: int = 0
    temperature: float = 1.0
    greedy: bool = False
    """Take the most likely token instead of a random one."""
    whole: bool = False
    """Do not stop at the end of a sentence."""


@dataclass(frozen=True)
class Continuation:
    """What was drawn: text up to the stop, its length and its log-probability at temperature 1."""

    text: str
    token_count: int
    log_probability: float
    stop: Literal["sentence", "end", "length"]
    node: Node
    """The prefix with this continuation; None after the end of a response."""


R = TypeVar("R")
Steps = Generator[list[Draw], list[Continuation], R]
"""Work on one prompt: yields draws, is sent their continuations in the same order, returns R."""


@dataclass(frozen=True)
class TokenDistribution:
    """Probabilities of the requested tokens, renormalised, and their share of the full softmax."""

    probabilities: tuple[float, ...]
    mass: float


@dataclass
class Work:
    """What an engine has computed since it was loaded.

    An engine that cannot count something leaves it at 0.
    """

    prompts: int = 0
    image_encodings: int = 0
    prefilled_tokens: int = 0
    """Tokens of prompts and prefixes that went through the model, padding not counted."""
    decoded_tokens: int = 0
    forward_passes: int = 0
    """Of the language model, each for a whole batch."""

    def add(self, other: Work) -> None:
        """Adds what another engine has computed."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def take(self) -> Work:
        """Returns what was counted so far, and starts again at 0."""
        taken = Work(**vars(self))
        vars(self).update(vars(Work()))
        return taken


class SamplingEngine(Protocol):
    """Continues responses of a policy."""

    work: Work

    @property
    def in_flight(self) -> int:
        """Batches of prompts that may be open at the same time."""
        ...

    def prepare(self, prompts: Sequence[Prompt]) -> Any:
        """Loads images and encodes texts, on the CPU. May run in another thread than the rest."""
        ...

    def open(self, prepared: Any) -> list[Node]:
        """Returns a node for each of the prompts that `prepare` got together."""
        ...

    def submit(self, draws: Sequence[Draw]) -> list[int]:
        """Accepts draws, of which several may share a node; returns a ticket for each."""
        ...

    def finished(self) -> list[tuple[int, Continuation]]:
        """Waits until at least one of the submitted draws is finished.

        Returns:
            Tickets with what was drawn, in any order, each once; empty if nothing is submitted.
        """
        ...

    def close(self) -> None:
        """Ends what the engine has started; it cannot be used afterwards."""
        ...


class RatingEngine(Protocol):
    """Reads what a text model expects to come next."""

    work: Work

    def next_token_distribution(
        self, prompts: Sequence[str], tokens: Sequence[str]
    ) -> list[TokenDistribution]:
        """Reads the distribution over ``tokens`` after each prompt; generates nothing."""
        ...

    def close(self) -> None:
        """Ends what the engine has started; it cannot be used afterwards."""
        ...
