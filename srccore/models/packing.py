"""Runs a causal language model over many token sequences in one row, a shared prefix only once.

The sequences are sorted and laid end to end without padding. A sequence that starts like the one
before it adds only the tokens from where they differ: a *segment*, whose tokens attend to the
sequence's own prefix, wherever in the row that is, and to themselves. Positions are those in the
sequence. All layers but attention see one row of distinct tokens, and the result for each sequence
is that of a forward pass over it alone, in gradients too (but for the order of sums).

Assumes a decoder that calls the attention function named in its configuration, softmax attention,
full or with a sliding window, and positions that come from ``position_ids``. `use_packing` checks
that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from srccore.errors import UserError
from srccore.models.shared_prefix import unknown_scores

__all__ = ["batches", "next_logits", "pack", "use_packing"]

ATTENTION = "srccore_packed"
GATHERED = 16384
"""Tokens whose keys are copied together, so that attention's memory is bounded."""


def batches(sequences: Sequence[list[int]], tokens: int) -> Iterator[list[int]]:
    """Divides sequences into batches that `pack` turns into rows of limited length.

    Args:
        sequences: Token ids, none of them empty.
        tokens: Most tokens of a row. A longer sequence has a row of its own.

    Yields:
        The numbers of the sequences of a batch, in the order of their token ids, which brings
        together what shares a prefix.
    """
    batch: list[int] = []
    used = 0
    previous: list[int] = []
    for number in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = sequences[number]
        new = len(sequence) - _shared(previous, sequence)
        if batch and used + new > tokens:
            yield batch
            batch, used, new = [], 0, len(sequence)
        batch.append(number)
        used += new
        previous = sequence
    if batch:
        yield batch


def pack(sequences: Sequence[list[int]]) -> dict[str, Any]:
    """Lays sequences into one row.

    Args:
        sequences: Token ids, none of them empty, in any order.

    Returns:
        What a model that has gone through `use_packing` takes, on the CPU. Its logits are of shape
        (1, sequences, vocabulary): those after each sequence, in the order given.
    """
    tokens: list[int] = []
    positions: list[int] = []
    last = [0] * len(sequences)
    segments = []
    path: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    previous: list[int] = []
    for number in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = sequences[number]
        shared = _shared(previous, sequence)
        added = np.arange(len(tokens), len(tokens) + len(sequence) - shared)
        path = np.concatenate([path[:shared], added])
        if len(added):
            segments.append(_Segment(shared, path))
            tokens += sequence[shared:]
            positions += range(shared, len(sequence))
        last[number] = int(path[-1])
        previous = sequence
    return {
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.tensor([positions]),
        "logits_to_keep": torch.tensor(last),
        "packed": _Layout.of(segments, len(tokens)),
        "use_cache": False,
    }


def next_logits(model: Any, row: dict[str, Any]) -> Tensor:
    """Computes what follows each sequence of a row, in one forward pass.

    Args:
        model: A model that has gone through `use_packing`.
        row: What `pack` returns.

    Returns:
        (sequences, vocabulary).
    """
    inputs = {
        name: value.to(model.device) if hasattr(value, "to") else value
        for name, value in row.items()
    }
    logits: Tensor = model(**inputs).logits[0]
    return logits


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Returns the length of the prefix that two sequences share."""
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return min(len(left), len(right))


@dataclass(frozen=True, eq=False)
class _Segment:
    """The tokens that a sequence adds to the row."""

    shared: int
    """Length of the prefix that is in the row already."""
    path: NDArray[np.int64]
    """Where in the row each token of the whole sequence is."""

    @property
    def added(self) -> NDArray[np.int64]:
        return self.path[self.shared :]


@dataclass(frozen=True, eq=False)
class _Block:
    """Segments of like length, whose attention is computed together."""

    queries: Tensor
    """(segments, queries), places in the row; those past a segment's end repeat a place."""
    keys: Tensor
    """(segments, keys), places in the row of the sequence up to the end of the segment."""
    first: Tensor
    """(segments,), the position of the first query in its sequence."""


class _Layout:
    """Where each token of a row finds its prefix."""

    def __init__(self, blocks: Sequence[_Block], places: Tensor) -> None:
        self.blocks = blocks
        self.places = places
        """(length,), where each token of the row is in the queries of all blocks, end to end."""
        self._masks: dict[tuple[int | None, int], list[Tensor]] = {}

    @classmethod
    def of(cls, segments: Sequence[_Segment], length: int) -> _Layout:
        """Groups segments by the power of two above their length, and bounds the groups."""
        groups: dict[int, list[_Segment]] = {}
        for segment in sorted(segments, key=lambda each: len(each.path)):
            groups.setdefault((len(segment.added) - 1).bit_length(), []).append(segment)
        places = np.zeros(length, dtype=np.int64)
        blocks = []
        offset = 0
        for group in groups.values():
            # Sorted, so the last one of a part has the most keys.
            for part in _parts(group, GATHERED):
                width = max(len(segment.added) for segment in part)
                queries = np.zeros((len(part), width), dtype=np.int64)
                keys = np.zeros((len(part), len(part[-1].path)), dtype=np.int64)
                for row, segment in enumerate(part):
                    added = segment.added
                    queries[row, : len(added)] = added
                    keys[row, : len(segment.path)] = segment.path
                    places[added] = offset + row * width + np.arange(len(added))
                offset += queries.size
                first = torch.tensor([segment.shared for segment in part])
                blocks.append(_Block(torch.from_numpy(queries), torch.from_numpy(keys), first))
        return cls(blocks, torch.from_numpy(places))

    def to(self, device: Any, non_blocking: bool = False) -> _Layout:
        """Copies the layout to a device; trainers do so with all inputs of a model."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        blocks = [
            _Block(moved(block.queries), moved(block.keys), moved(block.first))
            for block in self.blocks
        ]
        return _Layout(blocks, moved(self.places))

    def masks(self, window: int | None, times: int) -> list[Tensor]:
        """Returns for each block (segments, 1, times * queries, keys), true where a query may look.

        Every query has a key, those past a segment's end, too: a softmax over none is not a number.

        Args:
            window: The greatest number of tokens that a query attends to, if there is one.
            times: How often the queries are repeated.
        """
        kind = window, times
        if kind not in self._masks:
            self._masks[kind] = [
                _mask(block, window).repeat(1, 1, times, 1) for block in self.blocks
            ]
        return self._masks[kind]


def _parts(segments: Sequence[_Segment], most: int) -> Iterator[list[_Segment]]:
    """Divides segments, sorted by length of path, so that no part has more than so many keys."""
    part: list[_Segment] = []
    for segment in segments:
        if part and (len(part) + 1) * len(segment.path) > most:
            yield part
            part = []
        part.append(segment)
    yield part


def _mask(block: _Block, window: int | None) -> Tensor:
    device = block.keys.device
    queries = torch.arange(block.queries.shape[1], device=device)
    # Queries past a segment's end stay within the keys, so that a window does not miss them all.
    ends = block.first[:, None] + queries
    ends = ends.clamp(max=block.keys.shape[1] - 1)[..., None]
    # A key's place in its block is its position in the sequence.
    keys = torch.arange(block.keys.shape[1], device=device)
    allowed = keys <= ends
    if window is not None:
        allowed &= keys > ends - window
    return allowed[:, None]


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: _Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row.

    Args:
        module: The attention layer.
        query: (1, heads, length, width).
        key: (1, key heads, length, width).
        value: As ``key``.
        attention_mask: None: the layout decides.
        packed: The row's layout.
        scaling: Factor of the scores.
        dropout: Share of the weights that are dropped.
        sliding_window: The greatest number of tokens that a query attends to, if there is one.
        others: What models pass besides.

    Returns:
        (1, length, heads, width), and no weights.
    """
    unknown = unknown_scores(others)
    if unknown or attention_mask is not None:
        # `use_packing` tries a model out, and turns this into its reason for refusing it.
        raise NotImplementedError(f"its attention has {', '.join(unknown) or 'a mask'}")
    heads = query.shape[1]
    shared = heads // key.shape[1]
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    found = []
    for block, mask in zip(packed.blocks, packed.masks(sliding_window, shared), strict=True):
        # (segments, key heads, queries of all heads that share a key head, width): with a mask,
        # no fast kernel shares keys by itself.
        queries = torch.unflatten(query[block.queries], 2, (-1, shared))
        queries = queries.permute(0, 2, 3, 1, 4).flatten(2, 3)
        mixed = scaled_dot_product_attention(
            queries,
            key[block.keys].transpose(1, 2),
            value[block.keys].transpose(1, 2),
            attn_mask=mask,
            dropout_p=dropout,
            scale=scaling,
        )
        mixed = torch.unflatten(mixed, 2, (shared, -1)).permute(0, 3, 1, 2, 4)
        found.append(mixed.reshape(-1, heads, mixed.shape[-1]))
    return torch.cat(found)[packed.places][None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)

_PROBES = ([1, 2, 3, 4, 5, 6], [1, 2, 3, 6, 5, 4], [3, 4])
"""Sequences with and without a shared prefix; every vocabulary has these ids."""


@torch.no_grad()
def use_packing(model: Any) -> None:
    """Makes a model take the inputs that `pack` makes, and no others.

    It is tried out: short sequences must have the same logits packed together as each alone.

    Args:
        model: A causal language model.

    Raises:
        UserError: The model's attention is of a kind that cannot be packed.
    """
    model.set_attn_implementation(ATTENTION)
    training, reason = model.training, "its tokens see other sequences or wrong positions"
    model.eval()
    try:
        together = next_logits(model, pack(_PROBES))
        alone = torch.cat([next_logits(model, pack([probe])) for probe in _PROBES])
    except (NotImplementedError, TypeError) as error:
        reason, is_equal = str(error), False
    else:
        # By the mean: of 150,000 logits in bfloat16, some always differ.
        tolerance = torch.finfo(model.dtype).eps ** 0.5 * alone.std()
        is_equal = together.shape == alone.shape and bool(
            (together - alone).square().mean().sqrt() <= tolerance
        )
    model.train(training)
    if not is_equal:
        raise UserError(
            f"{type(model).__name__} cannot be R-Scorer: {reason}.",
            "Choose a rating model with full or sliding attention and rotary positions, such as "
            "Qwen2.5.",
        )
