"""Engines based on transformers: for any device, and the default on a CPU.

Sampling encodes each image and each prompt once; a node is a row of a batch of responses, and
drawing from it continues from its cache, so no prefix is ever encoded twice
(`srccore.models.shared_prefix`). Positions are the model's own: those of Qwen2.5-VL depend on the
image.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srccore.errors import UserError
from srccore.method.engine import Continuation, Draw, Prompt, Work
from srccore.models.families import prompt_positions
from srccore.models.policy import prompt_text
from srccore.models.shared_prefix import Decoding, Prompts, Responses, prompt_cache
from srccore.models.writing import Vocabulary, Writer

__all__ = ["TransformersSamplingEngine"]

_WORTH_DROPPING = 0.25
"""Rows that have stopped leave a batch once they are this share of it: leaving costs a copy."""


@dataclass(frozen=True, eq=False)
class _Node:
    """A prefix: its row in a batch, and the response's tokens so far."""

    batch: Responses
    row: int
    tokens: tuple[int, ...] = ()


class TransformersSamplingEngine:
    """Continues responses of a vision-language model, those of one batch of prompts at a time.

    Args:
        model: A model for conditional generation from an image and a text.
        processor: Its processor, with a chat template that ends a turn.

    Raises:
        UserError: The model's attention is of a kind that the engine does not support, or the
            chat template does not end a turn.
    """

    in_flight = 1
    """All that is open is decoded together."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.work = Work()
        self._model = model.eval()
        # Its own: a tokenizer must not be used by two threads at a time.
        self._processor = copy.deepcopy(processor)
        self._submitted: dict[int, Draw] = {}
        self._tickets = itertools.count()
        _check_attention(model)
        self._vocabulary = Vocabulary(model, processor)
        self._banned = torch.tensor(self._vocabulary.banned, dtype=torch.long, device=model.device)

    def prepare(self, prompts: Sequence[Prompt]) -> Any:
        """Returns the model's inputs, with padding on the left."""
        return encode_prompts(self._processor, prompts)

    @torch.inference_mode()
    def open(self, prepared: Any) -> list[_Node]:
        """Encodes images and prompts in one forward pass."""
        count = len(prepared["input_ids"])
        self.work.prompts += count
        self.work.image_encodings += count
        self.work.prefilled_tokens += int(prepared["attention_mask"].sum())
        self.work.forward_passes += 1
        inputs = {
            name: value.to(self._model.dtype) if value.is_floating_point() else value
            for name, value in prepared.to(self._model.device).items()
        }
        mask = inputs["attention_mask"].bool()
        positions, following = prompt_positions(
            self._model.base_model, inputs["input_ids"], mask, inputs
        )
        cache = prompt_cache()
        output = self._model(
            **inputs,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        encoded = Prompts([(layer.keys, layer.values) for layer in cache.layers], mask, following)
        batch = Responses(
            prompts=encoded,
            owners=torch.arange(len(mask), device=mask.device),
            layers=[],
            mask=mask[:, :0],
            logits=output.logits[:, -1].float(),
        )
        return [_Node(batch, row) for row in range(len(mask))]

    def submit(self, draws: Sequence[Draw]) -> list[int]:
        """Accepts draws; `finished` decodes them."""
        tickets = list(itertools.islice(self._tickets, len(draws)))
        self._submitted.update(zip(tickets, draws, strict=True))
        return tickets

    @torch.inference_mode()
    def finished(self) -> list[tuple[int, Continuation]]:
        """Decodes all submitted draws of one length limit, of prompts that were opened together.

        The shortest come first. So a search that draws whole responses waits until the others of
        its batch do so, too, instead of holding up their sentences.
        """
        if not self._submitted:
            return []
        first = _group(min(self._submitted.values(), key=_group))
        tickets = [ticket for ticket, draw in self._submitted.items() if _group(draw) == first]
        draws = [self._submitted.pop(ticket) for ticket in tickets]
        found = self._decode_together(draws, draws[0].max_tokens, draws[0].whole)
        return list(zip(tickets, found, strict=True))

    def close(self) -> None:
        """Does nothing: memory is freed with the last reference to the engine."""

    def _decode_together(
        self, draws: list[Draw], max_tokens: int, whole: bool
    ) -> list[Continuation]:
        decoding = Decoding(self._model, [(draw.node.batch, draw.node.row) for draw in draws])
        choose = _Chooser(draws, max_tokens, self._banned)
        writers = [Writer(self._vocabulary, draw.node.tokens, whole) for draw in draws]
        rows = list(range(len(draws)))  # the draw that each row of the decoding belongs to
        nodes: dict[int, _Node] = {}

        def leave(places: list[int]) -> None:
            continuing = [place for place in places if writers[rows[place]].stop != "end"]
            batch = decoding.responses(continuing) if continuing else None
            for number, place in enumerate(continuing):
                writer = writers[rows[place]]
                assert batch is not None
                nodes[rows[place]] = _Node(batch, number, writer.tokens)

        for step in range(max_tokens):
            tokens, scores = choose(decoding.logits, step)
            # One copy to the host per step. A float64 represents every token id.
            drawn = torch.stack([tokens.double(), scores.double()]).tolist()
            fed = [
                writers[row].write(int(token), score)
                for row, token, score in zip(rows, *drawn, strict=True)
            ]
            # A row that drew its last token at the limit is still fed it, to be continued later.
            if not any(fed):
                break
            alive = torch.tensor(fed, device=tokens.device)
            if fed.count(False) >= _WORTH_DROPPING * len(fed):
                leave([place for place, is_fed in enumerate(fed) if not is_fed])
                kept = [place for place, is_fed in enumerate(fed) if is_fed]
                decoding.keep(kept)
                choose.keep(kept)
                rows = [rows[place] for place in kept]
                tokens, alive = tokens[alive], alive[alive]
            decoding.feed(tokens, alive)
            self.work.forward_passes += 1
        leave(list(range(len(rows))))
        self.work.decoded_tokens += sum(writer.count for writer in writers)
        return [
            Continuation(
                text=writer.text,
                token_count=writer.count,
                log_probability=writer.log_probability,
                stop=writer.stop or "length",
                node=nodes.get(row),
            )
            for row, writer in enumerate(writers)
        ]


def _group(draw: Draw) -> tuple[int, bool, int]:
    """Draws of the same group can be decoded together."""
    return draw.max_tokens, draw.whole, id(draw.node.batch.prompts)


class _Chooser:
    """Chooses tokens by inverse transform sampling; a row's numbers depend only on its own seed."""

    def __init__(self, draws: list[Draw], max_tokens: int, banned: Tensor) -> None:
        device = banned.device
        self.banned = banned
        self.greedy = torch.tensor([draw.greedy for draw in draws], device=device)
        self.all_greedy = all(draw.greedy for draw in draws)
        self.temperature = torch.tensor([[draw.temperature] for draw in draws], device=device)
        if not self.all_greedy:
            numbers = [
                np.random.Generator(np.random.Philox(key=draw.seed)).random(max_tokens)
                for draw in draws
            ]
            self.uniforms = torch.from_numpy(np.stack(numbers, axis=1)).to(device)

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows."""
        self.greedy, self.temperature = self.greedy[rows], self.temperature[rows]
        if not self.all_greedy:
            self.uniforms = self.uniforms[:, rows]

    def __call__(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Returns a token for each row and its log-probability under the model as it is."""
        allowed = logits.index_fill(1, self.banned, -torch.inf)
        tokens = allowed.argmax(-1)
        if not self.all_greedy:
            heights = (allowed / self.temperature).double().softmax(-1).cumsum(-1)
            levels = self.uniforms[step][:, None] * heights[:, -1:]
            drawn = torch.searchsorted(heights, levels, right=True)[:, 0]
            tokens = torch.where(self.greedy, tokens, drawn.clamp(max=logits.shape[-1] - 1))
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def _check_attention(model: Any) -> None:
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(
            f"The sampling engine does not support {type(model).__name__}: its layers have "
            f"{', '.join(sorted(unknown))}.",
            "Choose a model with full or sliding attention in all layers.",
        )


def encode_prompts(processor: Any, prompts: Sequence[Prompt]) -> Any:
    """Renders prompts with the chat template and encodes them, with padding on the left."""
    texts = [prompt_text(processor, prompt.question) for prompt in prompts]
    return processor(
        images=[prompt.image() for prompt in prompts],
        text=texts,
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
