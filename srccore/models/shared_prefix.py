"""Decodes many responses at once over one key-value cache per prompt.

All responses to a prompt attend to the same cache of that prompt, so it is in memory once and is
read once per layer and step, however many responses are drawn. Each response has a cache of its
own for the tokens that follow. Assumes a decoder that calls the attention function named in its
configuration with one query per row, plain softmax attention, full or with a sliding window.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["Decoding", "Prompts", "Responses", "prompt_cache", "unknown_scores"]

ATTENTION = "srccore_shared_prefix"
BLOCK = 32
"""Tokens by which the caches of responses grow."""

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values by layer, each of shape (heads, rows, length, width).

Heads come first, so that the responses to a prompt are neighbours in every head: then one product
per head and prompt serves all of them, and nothing has to be moved.
"""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts that were encoded together."""

    layers: Layers
    mask: Tensor
    """(prompts, length), true where a prompt has a token."""
    following: Tensor
    """(prompts,), the position of the token that follows each prompt."""


@dataclass(frozen=True, eq=False)
class Responses:
    """Responses so far that were decoded together; ``length`` is 0 before the first token."""

    prompts: Prompts
    owners: Tensor
    """(rows,), the prompt of each row."""
    layers: Layers
    """Empty if ``length`` is 0."""
    mask: Tensor
    """(rows, length), true where a row has a token: rows stop at different places."""
    logits: Tensor
    """(rows, vocabulary), of the next token."""


class Decoding:
    """Decodes a batch of responses, token by token.

    Args:
        model: The model.
        sources: The response that each row continues, as its batch and row; all of one `Prompts`.
    """

    def __init__(self, model: Any, sources: Sequence[tuple[Responses, int]]) -> None:
        self._model = model
        self._config = model.get_decoder().config
        self._prompts = sources[0][0].prompts
        device = self._prompts.mask.device
        batches: dict[int, tuple[Responses, list[int], list[int]]] = {}
        for row, (batch, number) in enumerate(sources):
            _, new_rows, old_rows = batches.setdefault(id(batch), (batch, [], []))
            new_rows.append(row)
            old_rows.append(number)
        parts = [
            (batch, torch.tensor(new_rows, device=device), torch.tensor(old_rows, device=device))
            for batch, new_rows, old_rows in batches.values()
        ]
        length = max(batch.mask.shape[1] for batch, _, _ in parts)
        first = sources[0][0]
        self._owners = first.owners.new_empty(len(sources))
        self._mask = first.mask.new_zeros(len(sources), length)
        self.logits = first.logits.new_empty(len(sources), first.logits.shape[1])
        for batch, rows, numbers in parts:
            self._owners[rows] = batch.owners[numbers]
            self._mask[rows, : batch.mask.shape[1]] = batch.mask[numbers]
            self.logits[rows] = batch.logits[numbers]

        def room(states: Tensor) -> Tensor:
            # Zeros: some rows are shorter than others, and what a mask hides is still multiplied.
            heads, _, _, width = states.shape
            return states.new_zeros(heads, len(sources), length + BLOCK, width)

        layers = [
            _ResponseLayer(room(keys), room(values), length)
            for keys, values in first.prompts.layers
        ]
        for batch, rows, numbers in parts:
            for layer, states in zip(layers, batch.layers, strict=False):
                for new, old in zip(layer.room, states, strict=True):
                    new[:, rows, : old.shape[2]] = old[:, numbers]
        self._cache = Cache(layers=layers)
        self._shared = _Shared(self._prompts, self._owners)

    def feed(self, tokens: Tensor, alive: Tensor) -> None:
        """Appends a token to each row that is alive, and computes the logits of its next one.

        Args:
            tokens: (rows,); of a row that is not alive, any token.
            alive: (rows,), whether the row continues. The others stay as they are.
        """
        positions = self._prompts.following[self._owners] + self._mask.sum(-1)
        self._mask = torch.cat([self._mask, alive[:, None]], dim=1)
        self._shared.restart(self._mask)
        with self._attention():
            output = self._model(
                input_ids=tokens[:, None],
                position_ids=positions[:, None],
                past_key_values=self._cache,
                use_cache=True,
                shared=self._shared,
            )
        self.logits = torch.where(alive[:, None], output.logits[:, -1].float(), self.logits)

    def responses(self, rows: Sequence[int]) -> Responses:
        """Returns some rows, to be continued later."""
        chosen = torch.tensor(rows, device=self._owners.device)
        everything = len(rows) == len(self._owners)
        layers = [(layer.keys, layer.values) for layer in self._cache.layers]
        return Responses(
            prompts=self._prompts,
            owners=self._owners[chosen],
            layers=layers if everything else [(k[:, chosen], v[:, chosen]) for k, v in layers],
            mask=self._mask[chosen],
            logits=self.logits[chosen],
        )

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows."""
        chosen = torch.tensor(rows, device=self._owners.device)
        for layer in self._cache.layers:
            layer.keep(chosen)
        self._owners = self._owners[chosen]
        self._mask, self.logits = self._mask[chosen], self.logits[chosen]
        self._shared = _Shared(self._prompts, self._owners)

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        previous = self._config._attn_implementation
        self._config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            self._config._attn_implementation = previous


class _Shared:
    """What the attention of one step needs to know about the prompts."""

    def __init__(self, prompts: Prompts, owners: Tensor) -> None:
        self.layers = prompts.layers
        self.count, self.length = prompts.mask.shape
        self._prompt_mask = prompts.mask[owners]
        self._biases: dict[int | None, Tensor] = {}
        # Rows are laid out as a grid, a line of slots per prompt; some slots may stay empty.
        filled = [0] * self.count
        slots = []
        for owner in owners.tolist():
            slots.append((owner, filled[owner]))
            filled[owner] += 1
        self._width = max(filled)
        numbers = [owner * self._width + place for owner, place in slots]
        self._is_grid = numbers == list(range(self.count * self._width))
        self._slots = torch.tensor(numbers, device=owners.device)

    def restart(self, mask: Tensor) -> None:
        """Starts a step, in which the responses have these tokens, the new one included."""
        self._mask = torch.cat([self._prompt_mask, mask], dim=1)
        self._biases = {}

    def bias(self, window: int | None) -> Tensor:
        """Returns (rows, 1, length): 0 where a row may attend, else minus infinity."""
        if window not in self._biases:
            allowed = self._mask
            if window is not None:
                # By a row's own tokens: the cache has gaps, so places in it are not distances.
                since = allowed.flip(-1).cumsum(-1).flip(-1)
                allowed = allowed & (since <= window)
            bias = torch.zeros(allowed.shape, device=allowed.device)
            self._biases[window] = bias.masked_fill_(~allowed, -torch.inf)[:, None]
        return self._biases[window]

    def spread(self, rows: Tensor) -> Tensor:
        """Turns (heads, rows, group, width) into (heads, prompts, responses * group, width)."""
        if not self._is_grid:
            heads, _, *rest = rows.shape
            grid = rows.new_zeros(heads, self.count * self._width, *rest)
            rows = grid.index_copy_(1, self._slots, rows)
        return torch.unflatten(rows, 1, (self.count, self._width)).flatten(2, 3)

    def gather(self, grid: Tensor) -> Tensor:
        """Reverses `spread`."""
        rows = torch.unflatten(grid, 2, (self._width, -1)).flatten(1, 2)
        return rows if self._is_grid else rows.index_select(1, self._slots)


def unknown_scores(arguments: Mapping[str, Any]) -> list[str]:
    """Names what a model does to the scores of its attention that is not plain softmax.

    Args:
        arguments: What the model passes to an attention function besides queries, keys and values.
    """
    return [
        name for name in ("softcap", "s_aux", "position_bias") if arguments.get(name) is not None
    ]


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared: _Shared,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one query per row over the prompt's cache and the row's own.

    One softmax over both, so the result is that of attention over the two concatenated. Products
    are summed, and the softmax is computed, in float32.

    Args:
        module: The attention layer.
        query: (rows, heads, 1, width).
        key: (key heads, rows, length, width), of the row's own tokens.
        value: As ``key``.
        attention_mask: None: the masks are in ``shared``.
        shared: The prompts.
        scaling: Factor of the scores.
        sliding_window: The greatest number of tokens that a query attends to, if there is one.
        others: What models pass besides.

    Returns:
        (rows, 1, heads, width), and no weights.
    """
    unknown = unknown_scores(others)
    if unknown or attention_mask is not None or query.shape[2] != 1:
        raise NotImplementedError(f"Attention with {unknown or 'a mask, or several queries'}.")
    rows, heads, _, width = query.shape
    queries = query.reshape(rows, key.shape[0], -1, width).transpose(0, 1).contiguous()
    prompt_keys, prompt_values = shared.layers[module.layer_idx]
    scores = torch.cat(
        [
            shared.gather(_product(shared.spread(queries), prompt_keys.mT)),
            _product(queries, key.mT),
        ],
        dim=-1,
    )
    factor = width**-0.5 if scaling is None else scaling
    scores = torch.add(shared.bias(sliding_window), scores, alpha=factor)
    weights = scores.softmax(-1).to(value.dtype)
    over_prompt, over_own = weights[..., : shared.length], weights[..., shared.length :]
    mixed = _product(over_own, value)
    mixed = mixed + shared.gather(_product(shared.spread(over_prompt), prompt_values))
    mixed = mixed.transpose(0, 1).to(query.dtype, memory_format=torch.contiguous_format)
    return mixed.reshape(rows, 1, heads, -1), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiplies matrices of shape (a, b, ...) into float32, without a float32 copy on a GPU."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        product = torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out_dtype=torch.float32)
        return torch.unflatten(product, 0, left.shape[:2])
    return left.float() @ right.float()


class _ResponseLayer(DynamicLayer):  # type: ignore[misc]  # transformers is read without types
    """The cache of responses in one layer; it grows in blocks, so appending copies nothing."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.room = (keys, values)
        self._length = length
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._length == self.room[0].shape[2]:
            keys, values = self.room
            self.room = (_grown(keys), _grown(values))
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, self._length] = new[:, :, 0].transpose(0, 1)
        self._length += 1
        self._show()
        return self.keys, self.values

    def keep(self, rows: Tensor) -> None:
        """Drops all other rows."""
        keys, values = self.room
        self.room = (keys[:, rows], values[:, rows])
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (room[:, :, : self._length] for room in self.room)


def _grown(room: Tensor) -> Tensor:
    heads, rows, length, width = room.shape
    grown = room.new_zeros(heads, rows, length + BLOCK, width)
    grown[:, :, :length] = room
    return grown


class _PromptLayer(DynamicLayer):  # type: ignore[misc]
    """The cache of prompts in one layer: filled once."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.lazy_initialization(key_states, value_states)
        self.keys = key_states.transpose(0, 1).contiguous()
        self.values = value_states.transpose(0, 1).contiguous()
        return key_states, value_states


def prompt_cache() -> Cache:
    """Returns an empty cache for encoding prompts."""
    return Cache(layer_class_to_replicate=_PromptLayer)
