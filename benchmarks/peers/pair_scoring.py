"""Two usual ways to score pairs with a language model, each with the batches that suit it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from srccore.models.rating import encode_rating_prompts

__all__ = ["generate_and_parse", "read_whole_prompts"]

NEW_TOKENS = 4
"""Room for a space, the rating, a full stop and the end."""


@torch.inference_mode()
def read_whole_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[str], tokens: Sequence[int], batch: int
) -> list[list[float]]:
    """Reads the distribution over a few tokens after each whole prompt.

    Prompts of like length share a batch, and only the last position has logits.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: User messages.
        tokens: Token ids of the ratings.
        batch: Prompts of a forward pass.

    Returns:
        Probabilities, renormalised, for each prompt.
    """
    found: list[list[float]] = [[]] * len(prompts)
    for numbers, inputs in _padded(tokenizer, prompts, batch):
        logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, tokens]
        for number, row in zip(numbers, logits.double().softmax(-1).tolist(), strict=True):
            found[number] = row
    return found


@torch.inference_mode()
def generate_and_parse(
    model: Any, tokenizer: Any, prompts: Sequence[str], batch: int
) -> list[int | None]:
    """Lets the model write its rating, and looks for a digit in what it wrote.

    Returns:
        The rating for each prompt, or None where there is none.
    """
    found: list[int | None] = [None] * len(prompts)
    for numbers, inputs in _padded(tokenizer, prompts, batch):
        written = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = written[:, inputs["input_ids"].shape[1] :]
        for number, text in zip(numbers, tokenizer.batch_decode(new), strict=True):
            rating = re.search(r"[1-5]", text)
            found[number] = int(rating[0]) if rating else None
    return found


def _padded(
    tokenizer: Any, prompts: Sequence[str], batch: int
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    encoded = encode_rating_prompts(tokenizer, prompts)
    order = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        inputs = tokenizer.pad(
            {"input_ids": [encoded[number] for number in numbers]},
            padding_side="left",
            return_tensors="pt",
        )
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        yield numbers, {**inputs, "position_ids": positions}
