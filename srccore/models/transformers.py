"""Engines based on transformers: for any device, and the default on a CPU.

Sampling encodes each image and each prompt once. A node is a row of a batch's key-value cache;
extending it copies the row and continues decoding, so no prefix is ever encoded twice. Assumes a
decoder whose attention supports a 2-d mask with gaps (rows of a batch stop at different places)
and rotary or other positions that are passed explicitly: Llama, Mistral and Qwen2 do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from srccore.errors import UserError
from srccore.method import sentences
from srccore.method.engine import Continuation, Draw, Prompt, TokenDistribution
from srccore.models.policy import prompt_text

__all__ = ["TransformersRatingEngine", "TransformersSamplingEngine"]

_ENDING = (".", "?", "!", "\n", "Ċ", "<0x0A>")
"""A sentence can only end at a token with one of these, or at the token after it."""


@dataclass(frozen=True, eq=False)
class _Batch:
    """Prefixes that were encoded together.

    Shapes: ``keys`` and ``values`` per layer (rows, heads, length, width); ``mask``
    (rows, length), 1 where a row has a token; ``logits`` (rows, vocabulary) of the next token.
    """

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor
    logits: Tensor


@dataclass(frozen=True, eq=False)
class _Node:
    """A prefix: its row in a batch, and the response's tokens so far."""

    batch: _Batch
    row: int
    tokens: tuple[int, ...] = ()


class TransformersSamplingEngine:
    """Continues responses of a vision-language model.

    Args:
        model: A LLaVA-like model for conditional generation, in evaluation mode.
        processor: Its processor, with a chat template.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self._model = model.eval()
        self._processor = processor
        self._tokenizer = processor.tokenizer
        vocabulary = self._tokenizer.convert_ids_to_tokens(range(len(self._tokenizer)))
        self._may_end = [token is None or any(c in token for c in _ENDING) for token in vocabulary]
        eos = model.generation_config.eos_token_id
        if eos is None:
            eos = self._tokenizer.eos_token_id
        self._eos = set(eos if isinstance(eos, list) else [eos])
        banned = {model.config.image_token_id, self._tokenizer.pad_token_id} - {None} - self._eos
        self._banned = sorted(banned)

    @torch.inference_mode()
    def open(self, prompts: Sequence[Prompt]) -> list[_Node]:
        """Encodes images and prompts in one forward pass."""
        inputs = encode_prompts(self._processor, prompts).to(self._model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = _cache(())
        output = self._model(
            **inputs,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        batch = _Batch(_contents(cache), mask, output.logits[:, -1].float())
        return [_Node(batch, row) for row in range(len(prompts))]

    @torch.inference_mode()
    def extend(
        self, draws: Sequence[Draw], *, max_tokens: int, whole: bool = False
    ) -> list[Continuation]:
        """Draws one continuation per draw; draws of one batch are decoded together."""
        groups: dict[int, list[int]] = {}
        for number, draw in enumerate(draws):
            groups.setdefault(id(draw.node.batch), []).append(number)
        results: dict[int, Continuation] = {}
        for numbers in groups.values():
            group = [draws[number] for number in numbers]
            results.update(zip(numbers, self._extend_batch(group, max_tokens, whole), strict=True))
        return [results[number] for number in range(len(draws))]

    def _extend_batch(self, draws: list[Draw], max_tokens: int, whole: bool) -> list[Continuation]:
        source: _Batch = draws[0].node.batch
        rows = torch.tensor([draw.node.row for draw in draws], device=source.mask.device)
        cache = _cache([(k[rows], v[rows]) for k, v in source.layers])
        mask, logits = source.mask[rows], source.logits[rows]
        choose = _Chooser(draws, max_tokens, self._banned)
        writers = [_Row(draw.node.tokens, self._decode(draw.node.tokens)) for draw in draws]
        for step in range(max_tokens):
            tokens, scores = choose(logits, step)
            fed = []
            for writer, token, score in zip(writers, tokens.tolist(), scores.tolist(), strict=True):
                fed.append(self._write(writer, token, score, whole))
            # A row that drew its last token at the limit is still fed it, to be continued later.
            if not any(fed):
                break
            alive = torch.tensor(fed, device=mask.device)
            positions = mask.sum(-1, keepdim=True)
            mask = torch.cat([mask, alive[:, None].to(mask.dtype)], dim=1)
            output = self._model(
                input_ids=torch.where(alive, tokens, self._banned[0])[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits = torch.where(alive[:, None], output.logits[:, -1].float(), logits)
        batch = _Batch(_contents(cache), mask, logits)
        return [
            Continuation(
                text=self._text(writer),
                token_count=writer.count,
                log_probability=writer.log_probability,
                stop=writer.stop or "length",
                node=None
                if writer.stop == "end"
                else _Node(batch, row, (*writer.prefix, *writer.tokens)),
            )
            for row, writer in enumerate(writers)
        ]

    def _write(self, row: _Row, token: int, score: float, whole: bool) -> bool:
        """Adds a drawn token to a row; returns whether the model must be fed it."""
        if row.stop is not None:
            return False
        if token in self._eos:
            row.stop = "end"
            row.add(score)
            return False
        row.tokens.append(token)
        if not whole and (self._may_end[token] or row.may_end):
            end = sentences.first_end(self._text(row))
            if end is not None:
                row.stop = "sentence"
                last = row.tokens.pop()
                if len(self._text(row)) >= end:
                    # The token only showed that the sentence had ended: it will be drawn again.
                    return False
                row.tokens.append(last)
        row.may_end = self._may_end[token]
        row.add(score)
        return True

    def _text(self, row: _Row) -> str:
        # Some tokenizers drop a leading space: only the whole response decodes correctly.
        return self._decode([*row.prefix, *row.tokens])[row.prefix_length :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


class _Row:
    """What one draw has written so far."""

    def __init__(self, prefix: tuple[int, ...], prefix_text: str) -> None:
        self.prefix = prefix
        self.prefix_length = len(prefix_text)
        self.tokens: list[int] = []
        self.count = 0
        self.log_probability = 0.0
        self.stop: Any = None
        self.may_end = False

    def add(self, score: float) -> None:
        self.count += 1
        self.log_probability += score


class _Chooser:
    """Chooses tokens by inverse transform sampling; a row's numbers depend only on its own seed."""

    def __init__(self, draws: list[Draw], max_tokens: int, banned: list[int]) -> None:
        self.banned = banned
        self.greedy = all(draw.greedy for draw in draws)
        self.temperature = torch.tensor([[draw.temperature] for draw in draws])
        if not self.greedy:
            numbers = [
                np.random.Generator(np.random.Philox(key=draw.seed)).random(max_tokens)
                for draw in draws
            ]
            self.uniforms = torch.from_numpy(np.stack(numbers, axis=1))

    def __call__(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        logits[:, self.banned] = -torch.inf
        scores = logits.log_softmax(-1)
        if self.greedy:
            tokens = logits.argmax(-1)
        else:
            cooled = (logits / self.temperature.to(logits.device)).double()
            heights = cooled.softmax(-1).cumsum(-1)
            levels = self.uniforms[step].to(logits.device)[:, None] * heights[:, -1:]
            tokens = torch.searchsorted(heights, levels, right=True)[:, 0]
            tokens = tokens.clamp(max=logits.shape[-1] - 1)
        return tokens, scores.gather(1, tokens[:, None])[:, 0]


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers is read without types
    """A cache layer that grows in blocks: appending a token does not copy all previous ones."""

    BLOCK = 32

    def start(self, keys: Tensor, values: Tensor) -> None:
        self.lazy_initialization(keys, values)
        self.length = keys.shape[2]
        self.room = (keys, values)
        self.keys, self.values = keys, values

    def _grown(self, old: Tensor, extra: int) -> Tensor:
        room = old.new_empty(*old.shape[:2], extra, old.shape[3])
        return torch.cat([old[:, :, : self.length], room], dim=2)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.start(key_states, value_states)
            return self.keys, self.values
        end = self.length + key_states.shape[2]
        if end > self.room[0].shape[2]:
            extra = max(self.BLOCK, key_states.shape[2])
            keys, values = self.room
            self.room = (self._grown(keys, extra), self._grown(values, extra))
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, self.length : end] = new
        self.length = end
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values


def _cache(layers: Sequence[tuple[Tensor, Tensor]]) -> Cache:
    cache = Cache(layer_class_to_replicate=_RoomyLayer)
    for keys, values in layers:
        layer = _RoomyLayer()
        layer.start(keys, values)
        cache.layers.append(layer)
    return cache


def _contents(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def encode_prompts(processor: Any, prompts: Sequence[Prompt]) -> Any:
    """Renders prompts with the chat template and encodes them, with padding on the left."""
    texts = [prompt_text(processor, prompt.question) for prompt in prompts]
    return processor(
        images=[prompt.image for prompt in prompts],
        text=texts,
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


class TransformersRatingEngine:
    """Reads next-token distributions of a text-only causal language model.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, with a chat template.
        batch_size: Prompts per forward pass.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._batch_size = batch_size

    @classmethod
    def load(
        cls, folder: Path, device: str, batch_size: int, *, dtype: str = "auto"
    ) -> TransformersRatingEngine:
        """Loads the model from a folder that `train-scorer` wrote, by default in its own dtype."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
        return cls(model.to(device), AutoTokenizer.from_pretrained(folder), batch_size)

    @torch.inference_mode()
    def next_token_distribution(
        self, prompts: Sequence[str], tokens: Sequence[str]
    ) -> list[TokenDistribution]:
        """Reads the distributions; prompts of similar length share a batch."""
        wanted = [single_token(self._tokenizer, token) for token in tokens]
        encoded = [encode_rating_prompt(self._tokenizer, prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
        results: dict[int, TokenDistribution] = {}
        for start in range(0, len(order), self._batch_size):
            numbers = order[start : start + self._batch_size]
            batch = self._tokenizer.pad(
                {"input_ids": [encoded[number] for number in numbers]},
                padding_side="left",
                return_tensors="pt",
            ).to(self._model.device)
            positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            output = self._model(**batch, position_ids=positions, logits_to_keep=1, use_cache=False)
            shares = output.logits[:, -1].double().softmax(-1)[:, wanted]
            mass = shares.sum(-1, keepdim=True)
            for number, row, total in zip(
                numbers, (shares / mass).tolist(), mass[:, 0].tolist(), strict=True
            ):
                results[number] = TokenDistribution(tuple(row), total)
        return [results[number] for number in range(len(prompts))]


def single_token(tokenizer: Any, text: str) -> int:
    """Returns the token id of a text that must be a single token.

    Raises:
        UserError: The tokenizer splits it.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(
            f"The rating model's tokenizer encodes {text!r} as {len(ids)} tokens.",
            "Choose a rating model whose digits are single tokens, such as Qwen2.5.",
        )
    return int(ids[0])


def encode_rating_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Returns the token ids of a rating prompt, up to where the rating token follows."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer.encode(text, add_special_tokens=False))
