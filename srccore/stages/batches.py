"""The batches of samples that an engine computes together.

A batch is the same in any worker process and after an interruption, since what is computed together
may decide the last digits of a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from srccore.config import EngineConfig
from srccore.data.dataset import DataSet
from srccore.data.records import Sample
from srccore.models.policy import load_processor, prompt_text, prompt_tokens, read_policy

__all__ = ["by_length", "prompt_batches", "unfinished", "within_budget"]

T = TypeVar("T")


def prompt_batches(
    samples: Sequence[Sample], data: DataSet, policy: Path, engine: EngineConfig, batch_tokens: int
) -> list[list[Sample]]:
    """Batches samples for the engine of a stage.

    Args:
        samples: The samples.
        data: Their data set.
        policy: A ``policy.json`` or its folder: the policy that is prompted.
        engine: What opens the prompts. vLLM has no batches: there, each sample is one, so that it
            is durable as soon as it is finished.
        batch_tokens: As for `by_length`.

    Returns:
        The batches.
    """
    if engine.name == "vllm":
        return [[sample] for sample in samples]
    return by_length(samples, data, load_processor(read_policy(policy).base), batch_tokens)


def by_length(
    samples: Sequence[Sample], data: DataSet, processor: Any, batch_tokens: int
) -> list[list[Sample]]:
    """Batches samples by the length of their prompts, so that little is padded.

    Args:
        samples: The samples.
        data: Their data set, which has the sizes of their images.
        processor: The policy's processor.
        batch_tokens: The most tokens of the prompts of a batch, images and padding included.

    Returns:
        The batches, those of the longest prompts first: if one is too large for the memory, that
        shows at once.
    """
    lengths = {
        sample.id: prompt_tokens(
            processor, prompt_text(processor, sample.question), data.size(sample.id)
        )
        for sample in samples
    }
    # The id makes the order the same everywhere.
    ordered = sorted(samples, key=lambda sample: (-lengths[sample.id], sample.id))
    return within_budget(ordered, lambda sample: lengths[sample.id], batch_tokens)


def within_budget(ordered: Iterable[T], length: Callable[[T], int], most: int) -> list[list[T]]:
    """Fills batches one after the other.

    Args:
        ordered: What to batch, the longest first.
        length: The length of an item. The items of a batch are padded to its longest.
        most: The greatest padded length of a batch. A longer item is a batch by itself.

    Returns:
        The batches, in the same order.
    """
    batches: list[list[T]] = []
    for item in ordered:
        if batches and (len(batches[-1]) + 1) * length(batches[-1][0]) <= most:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def unfinished(batches: Iterable[list[T]], is_finished: Callable[[T], bool]) -> list[list[T]]:
    """Lists the batches that have to be computed; those that were interrupted as a whole."""
    return [batch for batch in batches if not all(map(is_finished, batch))]
