"""Responses as they are drawn, token by token: where they end, and what they must not contain.

The engines differ in how they compute tokens and share what is here, so that a sentence, its length
and its log-probability mean the same in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from srccore.errors import UserError
from srccore.method import sentences
from srccore.models.policy import response_text

__all__ = ["Vocabulary", "Writer", "banned_tokens", "end_tokens"]

_ENDING = (".", "?", "!", "\n", "Ċ", "<0x0A>")
"""A sentence can only end at a token with one of these, or at the token after it."""


class Vocabulary:
    """What the tokens of a policy mean for its responses.

    Args:
        model: A model for conditional generation from an image and a text.
        processor: Its processor, with a chat template that ends a turn.

    Raises:
        UserError: The chat template does not end a turn.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self._tokenizer = processor.tokenizer
        self.dtype = model.dtype
        tokens = _tokens_by_id(model, self._tokenizer)
        self.may_end = [token is None or any(c in token for c in _ENDING) for token in tokens]
        self.ends = end_tokens(model, processor)
        self.banned = banned_tokens(model, processor)

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of a response's tokens, from its start."""
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


class Writer:
    """What one draw has written so far.

    Args:
        vocabulary: The policy's.
        prefix: The tokens of the response that it continues.
        whole: Whether it continues past the end of a sentence.
    """

    def __init__(self, vocabulary: Vocabulary, prefix: tuple[int, ...], whole: bool) -> None:
        self._vocabulary = vocabulary
        self._whole = whole
        self._prefix = prefix
        self._prefix_length = len(vocabulary.decode(prefix))
        self._drawn: list[int] = []
        self._may_end = False
        self.count = 0
        """Tokens that count: those of the text, and one for the end of the response."""
        self.log_probability = 0.0
        """Of those, at temperature 1."""
        self.stop: Literal["sentence", "end"] | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of the response up to here."""
        return (*self._prefix, *self._drawn)

    @property
    def text(self) -> str:
        """What the draw has added to the response."""
        # Some tokenizers drop a leading space: only the whole response decodes correctly.
        return self._vocabulary.decode(self.tokens)[self._prefix_length :]

    def write(self, token: int, score: float) -> bool:
        """Adds a drawn token.

        Args:
            token: Its id.
            score: Its log-probability.

        Returns:
            Whether the token became part of the response, which then continues unless `stop` is
            set. The end of a sentence shows only in the token after it, which is dropped: it will
            be drawn again.

        Raises:
            UserError: The score is not a number.
        """
        if self.stop is not None:
            return False
        if math.isnan(score):
            raise UserError(
                f"The policy's logits are not numbers in {self._vocabulary.dtype}.",
                "Set model.dtype to bfloat16 or float32; if it is, the checkpoint is damaged.",
            )
        if token in self._vocabulary.ends:
            self.stop = "end"
            self._add(score)
            return False
        self._drawn.append(token)
        may_end = self._vocabulary.may_end[token]
        if not self._whole and (may_end or self._may_end):
            end = sentences.first_end(self.text)
            if end is not None:
                self.stop = "sentence"
                last = self._drawn.pop()
                if len(self.text) >= end:
                    return False
                self._drawn.append(last)
        self._may_end = may_end
        self._add(score)
        return True

    def _add(self, score: float) -> None:
        self.count += 1
        self.log_probability += score


def end_tokens(model: Any, processor: Any) -> set[int]:
    """Returns the ids that end a response.

    The generation configuration, the tokenizer and the chat template of a public checkpoint may
    each name another one, and a policy learns the template's.

    Raises:
        UserError: The chat template does not end a turn.
    """
    named = model.generation_config.eos_token_id
    ids = set(named if isinstance(named, list) else [named])
    ids.add(processor.tokenizer.eos_token_id)
    said = response_text(processor, "Yes.")
    ids.add(processor.tokenizer.encode(said, add_special_tokens=False)[-1])
    return ids - {None}


def banned_tokens(model: Any, processor: Any) -> list[int]:
    """Returns the ids that no response contains, in order.

    Those past the tokenizer (embeddings are often padded) and those that stand for something
    other than text: images, padding, the start of a text or a turn, tools' marks.
    """
    tokenizer = processor.tokenizer
    padding = {
        number for number, token in enumerate(_tokens_by_id(model, tokenizer)) if token is None
    }
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    # Not every checkpoint marks the placeholders of images as special.
    named = {
        value
        for name, value in model.config.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    size = model.get_output_embeddings().weight.shape[0]
    found = padding | marked | named
    return sorted(number for number in found - end_tokens(model, processor) if number < size)


def _tokens_by_id(model: Any, tokenizer: Any) -> list[str | None]:
    """Returns the token of each id that the model may write; None where there is none."""
    tokens: list[str | None] = [None] * model.get_output_embeddings().weight.shape[0]
    for token, number in tokenizer.get_vocab().items():
        if number < len(tokens):
            tokens[number] = token
    return tokens
