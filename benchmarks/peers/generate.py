"""Peers of the sampling engine, built on `generate` of transformers.

`PerNode` implements the protocol of `srccore.method.engine`, so that the same search runs on it.
Both are tuned: images are preprocessed once, `generate` runs with its cache, in inference mode, and
continuations of one prefix share a call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from srccore.method import sentences
from srccore.method.engine import Continuation, Draw, Prompt, Work
from srccore.models.transformers import encode_prompts
from srccore.models.writing import banned_tokens, end_tokens

__all__ = ["PerNode", "sample_responses"]


@dataclass(frozen=True, eq=False)
class _Node:
    inputs: dict[str, Any]
    """Of the prompt alone: what the processor returned."""
    tokens: tuple[int, ...] = ()


class PerNode:
    """Extends a tree node by node: one call of `generate` for all continuations of a node.

    So do implementations that keep no cache between calls (CSR, for example): each call encodes the
    image again and reads the prompt and the response so far again.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.in_flight = 1
        self.work = Work()
        self._model, self._processor = model.eval(), processor
        self._eos = sorted(end_tokens(model, processor))
        self._banned = banned_tokens(model, processor)
        self._submitted: dict[int, Draw] = {}
        self._tickets = itertools.count()

    def prepare(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Preprocesses each image once."""
        return [dict(encode_prompts(self._processor, [prompt])) for prompt in prompts]

    def open(self, prepared: list[dict[str, Any]]) -> list[_Node]:
        """Encodes nothing: there is no cache."""
        self.work.prompts += len(prepared)
        return [_Node(inputs) for inputs in prepared]

    def submit(self, draws: Sequence[Draw]) -> list[int]:
        """Accepts draws."""
        tickets = list(itertools.islice(self._tickets, len(draws)))
        self._submitted.update(zip(tickets, draws, strict=True))
        return tickets

    @torch.inference_mode()
    def finished(self) -> list[tuple[int, Continuation]]:
        """Extends one node."""
        if not self._submitted:
            return []
        first = next(iter(self._submitted.values()))
        tickets = [ticket for ticket, draw in self._submitted.items() if draw.node is first.node]
        draws = [self._submitted.pop(ticket) for ticket in tickets]
        prefix = torch.tensor([first.node.tokens], dtype=torch.long)
        inputs = dict(first.node.inputs)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], prefix], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        length = inputs["input_ids"].shape[1]
        stop = _SentenceEnd(self._processor.tokenizer, length)
        torch.manual_seed(first.seed % 2**63)
        made = self._model.generate(
            **inputs,
            num_return_sequences=len(draws),
            max_new_tokens=first.max_tokens,
            do_sample=not first.greedy,
            temperature=first.temperature,
            top_k=0,
            eos_token_id=self._eos,
            suppress_tokens=self._banned,
            stopping_criteria=StoppingCriteriaList([] if first.whole else [stop]),
            output_logits=True,
            return_dict_in_generate=True,
        )
        # `generate` repeats its inputs before it reads them.
        self.work.image_encodings += len(draws)
        self.work.prefilled_tokens += len(draws) * length
        self.work.forward_passes += len(made.logits)
        scores = torch.stack(made.logits, dim=1).log_softmax(-1)
        found = []
        for ticket, row, tokens in zip(
            tickets, scores, made.sequences[:, length:].tolist(), strict=True
        ):
            found.append((ticket, self._continuation(first.node, row, tokens)))
        self.work.decoded_tokens += sum(drawn.token_count for _, drawn in found)
        return found

    def _continuation(self, node: _Node, scores: Any, tokens: list[int]) -> Continuation:
        tokenizer = self._processor.tokenizer
        ended = next((n for n, token in enumerate(tokens) if token in self._eos), None)
        written = tokens if ended is None else tokens[:ended]
        text = tokenizer.decode(written)
        end = sentences.first_end(text)
        if end is not None:
            # Finished rows are padded, and the last token may only have shown the sentence's end.
            while len(tokenizer.decode(written[:-1])) >= end:
                written = written[:-1]
            text, ended = tokenizer.decode(written), None
        counted = tokens[: len(written) + (ended is not None)]
        chosen = scores[: len(counted)].gather(1, torch.tensor(counted)[:, None])
        return Continuation(
            text=text,
            token_count=len(counted),
            log_probability=float(chosen.sum()),
            stop="end" if ended is not None else "sentence" if end is not None else "length",
            node=None if ended is not None else _Node(node.inputs, (*node.tokens, *written)),
        )


class _SentenceEnd(StoppingCriteria):  # type: ignore[misc]  # transformers is read without types
    """Stops each row once its text has a whole sentence."""

    def __init__(self, tokenizer: Any, start: int) -> None:
        self._tokenizer, self._start = tokenizer, start

    def __call__(self, input_ids: Any, scores: Any, **others: Any) -> Any:
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        return torch.tensor([sentences.first_end(text) is not None for text in texts])


@torch.inference_mode()
def sample_responses(
    model: Any, processor: Any, prompts: Sequence[Prompt], count: int, max_tokens: int
) -> int:
    """Samples whole responses to a batch of prompts with one call of `generate`.

    Returns:
        The number of tokens drawn.
    """
    inputs = encode_prompts(processor, prompts)
    made = model.generate(
        **inputs,
        num_return_sequences=count,
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        do_sample=True,
        top_k=0,
        suppress_tokens=banned_tokens(model, processor),
    )
    return int(made[:, inputs["input_ids"].shape[1] :].numel())
