"""A sample as one row: its prompt once, then its responses, which do not see each other.

DPO compares two responses to one prompt. In a row of its own for each response, the image and the
prompt (most of the tokens) would be encoded twice by the policy and twice by the reference. Here, a
row is ``prompt, chosen, rejected``: a mask hides the chosen response from the rejected one, whose
positions start again after the prompt. So every token sees what it would see in a row of its own,
and the loss and its gradients are the same. The image is encoded once per step, for policy and
reference. It isn't kept for longer: for LLaVA-1.5-7B, encoding takes an H100 about 1 ms, and
reading the 4.7 MB of features from a disk of 1 GB/s about 5 ms; 12,000 samples would take 57 GB.

The model is given to TRL's trainers as if it had seen the responses alone: its hidden states are
those that predict the tokens of the responses, so the head never sees a prompt's position. The
loss, its metrics, the reference and the fused head are TRL's.

Assumes a family of `srccore.models.families` whose attention is full or has a sliding window, and
takes a mask (SDPA, the default). A mask excludes FlashAttention's own kernels, as padding does.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from srccore.method.engine import Work
from srccore.models.families import prompt_positions

__all__ = ["Collator", "Layout", "share_prompts"]

FULL, SLIDING = "full_attention", "sliding_attention"
PADDING, PROMPT = -1, 0
"""Segments of a row; its responses are 1, 2, ..."""
IGNORED = -100
"""The label of a token that is not learned."""


class Collator:
    """Makes the batches of a model of `share_prompts`.

    A batch of n rows with k responses has, besides what the processor returns for the images:

    * ``row_ids`` and ``segments``: (n, length), the tokens of the rows, and what they belong to.
    * ``attention_mask``: (n, length), 1 for a token and 0 for padding.
    * ``input_ids``: (k * n, 1 + response), the responses alone, first the first of all rows. They
      begin with a filler in place of the prompt's last token, which predicts their first token.
    * for TRL's SFT, with one response per row, ``labels``: the tokens of ``input_ids`` that are
      learned, or -100. For its DPO, ``completion_mask``: 1 for these tokens; and the columns
      ``row`` and ``drawn`` of the samples.

    Args:
        processor: The policy's processor.
        responses: The columns of the responses, in the order in which the loss expects them.
    """

    def __init__(self, processor: Any, responses: Sequence[str]) -> None:
        self.processor = processor
        self.responses = responses

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Makes a batch of samples with a prompt, images and responses (texts)."""
        tokenizer = self.processor.tokenizer
        batch: dict[str, Tensor] = dict(
            self.processor(
                images=[sample["images"] for sample in samples],
                text=[sample["prompt"] for sample in samples],
                add_special_tokens=False,
                padding=True,
                return_tensors="pt",
            )
        )
        is_token = batch.pop("attention_mask").bool()
        prompts = _rows(batch.pop("input_ids"), is_token)
        responses = [
            [
                torch.tensor(tokenizer.encode(sample[name], add_special_tokens=False))
                for sample in samples
            ]
            for name in self.responses
        ]
        rows = [torch.cat(parts) for parts in zip(prompts, *responses, strict=True)]
        segments = [
            torch.cat([torch.full((len(part),), number) for number, part in enumerate(parts)])
            for parts in zip(prompts, *responses, strict=True)
        ]
        filler = tokenizer.pad_token_id
        batch["row_ids"] = _padded(rows, filler)
        batch["segments"] = _padded(segments, PADDING)
        batch["attention_mask"] = (batch["segments"] != PADDING).long()
        if "mm_token_type_ids" in batch:
            kinds = _rows(batch["mm_token_type_ids"], is_token)
            rest = batch["row_ids"].shape[1]
            batch["mm_token_type_ids"] = torch.stack(
                [torch.nn.functional.pad(each, (0, rest - len(each))) for each in kinds]
            )
        answers = [each for column in responses for each in column]
        learned = _padded(
            [torch.cat([each.new_zeros(1), torch.ones_like(each)]) for each in answers]
        )
        batch["input_ids"] = _padded(
            [torch.cat([each.new_full((1,), filler), each]) for each in answers], filler
        )
        if len(self.responses) > 1:
            batch["completion_mask"] = learned
            batch["row"] = torch.tensor([sample["row"] for sample in samples])
            batch["drawn"] = torch.tensor([sample["drawn"] for sample in samples])
        else:
            batch["labels"] = batch["input_ids"].masked_fill(learned == 0, IGNORED)
        return batch


def _rows(padded: Tensor, is_token: Tensor) -> list[Tensor]:
    return [row[mask] for row, mask in zip(padded, is_token, strict=True)]


def _padded(rows: list[Tensor], value: int = 0) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)


@dataclass(frozen=True)
class Layout:
    """How the tokens of rows lie, read from their segments.

    Attributes:
        segments: (rows, length), as in `Collator`.
    """

    segments: Tensor

    @functools.cached_property
    def offsets(self) -> Tensor:
        """(rows, length), the number of tokens before each one in its segment."""
        return (self._is_own & self._is_before).sum(-1) - 1

    @functools.cached_property
    def prompt_lengths(self) -> Tensor:
        """(rows,), tokens of each prompt."""
        return (self.segments == PROMPT).sum(-1)

    def mask(self, window: int | None = None) -> Tensor:
        """Computes what each token sees: the prompt and its own response, up to itself.

        Padding sees something, too: a softmax over nothing isn't a number.

        Args:
            window: How many tokens back it sees, itself included, if attention has a window.

        Returns:
            (rows, 1, length, length), true where a token (third dimension) sees another.
        """
        is_prompt = (self.segments == PROMPT)[:, None, :]
        seen = (self._is_own | is_prompt) & self._is_before
        if window is not None:
            place = self.after_prompt(self.offsets, self.prompt_lengths)
            seen &= place[:, :, None] - place[:, None, :] < window
        return seen[:, None]

    def after_prompt(self, of_prompts: Tensor, following: Tensor) -> Tensor:
        """Gives the tokens of responses the positions that follow their prompt.

        Args:
            of_prompts: (..., rows, length), of which only the positions of prompts are read.
            following: (rows,), the position that follows each prompt.

        Returns:
            (..., rows, length), the positions of all tokens.
        """
        following = following[:, None] + self.offsets
        return torch.where(self.segments == PROMPT, of_prompts, following)

    def predicting(self, count: int, length: int) -> Tensor:
        """Finds the tokens whose hidden states predict the responses.

        Args:
            count: Responses of a row.
            length: Tokens of the longest response, plus one.

        Returns:
            (count, rows, length), places in a row: of the prompt's last token, then of each token
            of the response. Shorter responses are padded with arbitrary places.
        """
        last = self.prompt_lengths - 1
        steps = torch.arange(length, device=last.device)
        places = []
        for number in range(1, count + 1):
            before = ((self.segments >= PROMPT) & (self.segments < number)).sum(-1)
            place = before[:, None] + steps - 1
            place[:, 0] = last
            places.append(place)
        return torch.stack(places).clamp(max=self.segments.shape[1] - 1)

    @functools.cached_property
    def _is_own(self) -> Tensor:
        return self.segments[:, :, None] == self.segments[:, None, :]

    @functools.cached_property
    def _is_before(self) -> Tensor:
        length = self.segments.shape[1]
        return torch.ones(length, length, dtype=torch.bool, device=self.segments.device).tril()


def share_prompts(model: Any) -> Callable[[], Work]:
    """Makes a model read the batches of `Collator`, and others as before.

    Its backbone returns the hidden states that predict ``input_ids``, shaped like them.

    Args:
        model: A model for conditional generation, not yet wrapped by PEFT.

    Returns:
        Says what this process has computed so far; a prompt is counted in each pass over it.
    """
    backbone = model.base_model
    plain, reader = backbone.forward, _Reader(model)

    @functools.wraps(plain)
    def forward(*given: Any, segments: Tensor | None = None, **named: Any) -> Any:
        if segments is None:
            return plain(*given, **named)
        read = reader.read(segments, named)
        reader.work.add(Work(prompts=len(segments), forward_passes=1))
        # Not on the host yet, which would wait for the GPU.
        reader.tokens = reader.tokens + (segments != PADDING).sum()
        output = plain(
            input_ids=named["row_ids"],
            attention_mask=read.mask,
            position_ids=read.positions,
            mm_encoder_outputs={"image": read.images},
            **{name: value for name, value in named.items() if name not in reader.inputs},
        )
        rows = torch.arange(len(segments), device=segments.device)[:, None]
        states = output.last_hidden_state[rows, read.predicting]
        output.last_hidden_state = states.flatten(0, 1)
        return output

    backbone.forward = forward
    return lambda: dataclasses.replace(reader.work, prefilled_tokens=int(reader.tokens))


@dataclass(frozen=True)
class _Read:
    """What policy and reference share of a batch."""

    images: Any
    positions: Tensor
    mask: Any
    predicting: Tensor


class _Reader:
    """Encodes images, and computes positions and masks, once per batch."""

    def __init__(self, model: Any) -> None:
        self.backbone = model.base_model
        self._of_images = set(inspect.signature(self.backbone.get_image_features).parameters)
        self.inputs = {"input_ids", "row_ids", "attention_mask", "mm_token_type_ids"}
        self.inputs |= self._of_images
        self.work = Work()
        self.tokens: Tensor | int = 0
        self._last: tuple[Tensor, _Read] | None = None

    def read(self, segments: Tensor, inputs: Mapping[str, Any]) -> _Read:
        # The same tensor is the same batch: policy and reference read it in turn.
        if self._last is not None and self._last[0] is segments:
            return self._last[1]
        layout = Layout(segments)
        rows, length = inputs["input_ids"].shape
        count = rows // len(segments)
        of_prompts, following = prompt_positions(
            self.backbone, inputs["row_ids"], segments == PROMPT, inputs
        )
        # No adapter changes what encodes images (`srccore.models.folding`).
        with torch.no_grad():
            images = self._encode(inputs)
        self.work.image_encodings += len(segments)
        read = _Read(
            images=images,
            positions=layout.after_prompt(of_prompts, following),
            # A single response sees all that is before it: the model's own mask is faster.
            mask=_masks(layout, self.backbone) if count > 1 else inputs["attention_mask"],
            predicting=layout.predicting(count, length),
        )
        self._last = (segments, read)
        return read

    def _encode(self, inputs: Mapping[str, Any]) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        given = {name: value for name, value in inputs.items() if name in self._of_images}
        found = self.backbone.get_image_features(**given, return_dict=True)
        # Without the states of the tower's layers, which nothing reads.
        return BaseModelOutputWithPooling(pooler_output=found.pooler_output)


def _masks(layout: Layout, backbone: Any) -> Any:
    """Makes the mask of a language model, or one for each kind of its layers.

    It is added to the scores: SDPA would make such a mask of truth values again in each layer, and
    keep it for the backward pass.

    Raises:
        NotImplementedError: Its attention is of a kind that takes no such mask.
    """
    config = backbone.config.get_text_config()

    def added(window: int | None) -> Tensor:
        seen = layout.mask(window)
        return torch.zeros(seen.shape, dtype=backbone.dtype, device=seen.device).masked_fill_(
            ~seen, -torch.inf
        )

    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if config._attn_implementation != "sdpa" or not kinds <= {FULL, SLIDING}:
        raise NotImplementedError(
            f"Attention of {type(config).__name__} ({config._attn_implementation}, {kinds}) takes "
            "no mask that hides a response from another."
        )
    if kinds == {FULL, SLIDING}:
        return {FULL: added(None), SLIDING: added(window)}
    return added(None if kinds == {FULL} else window)
