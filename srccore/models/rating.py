"""R-Scorer's engine: reads ratings from a text-only causal language model.

Nothing is generated: one position after each prompt has all that is needed. The prompts of a
sample's pairs start alike, and `srccore.models.packing` finds that in their token ids, so no text
convention and no tokenizer decides about a result. The model is read in float32: in bfloat16,
scores have 8 bits, and candidates of nearly equal quality would be told apart by rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from srccore.errors import UserError
from srccore.method.engine import TokenDistribution, Work
from srccore.models.packing import batches, next_logits, pack, use_packing
from srccore.models.plain_text import control_tokens, without_control_tokens
from srccore.models.policy import load_weights, loading

__all__ = ["TransformersRatingEngine", "encode_rating_prompts", "single_token"]


class TransformersRatingEngine:
    """Reads next-token distributions of a text-only causal language model.

    Args:
        model: A causal language model; only this engine can use it from now on.
        tokenizer: Its tokenizer, with a chat template.
        batch_tokens: Most tokens of a forward pass; what prompts share counts once. A longer prompt
            has a forward pass of its own.

    Raises:
        UserError: The model's attention is of a kind that the engine does not support.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int) -> None:
        self.work = Work()
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._batch_tokens = batch_tokens
        use_packing(model)

    @classmethod
    def load(cls, folder: Path, device: str, batch_tokens: int) -> TransformersRatingEngine:
        """Loads the model from a folder that `train-scorer` wrote, in float32 whatever it was."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        settings = {"dtype": torch.float32, "device_map": {"": device}}
        model = load_weights(AutoModelForCausalLM, folder, **settings)
        with loading(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return cls(model, tokenizer, batch_tokens)

    @torch.inference_mode()
    def next_token_distribution(
        self, prompts: Sequence[str], tokens: Sequence[str]
    ) -> list[TokenDistribution]:
        """Reads the distributions; what prompts share at their start is computed once."""
        wanted = [single_token(self._tokenizer, token) for token in tokens]
        encoded = encode_rating_prompts(self._tokenizer, prompts)
        results: dict[int, TokenDistribution] = {}
        for numbers in batches(encoded, self._batch_tokens):
            row = pack([encoded[number] for number in numbers])
            with _fast_products(self._model.device.type):
                logits = next_logits(self._model, row)
            self.work.prompts += len(numbers)
            self.work.prefilled_tokens += row["input_ids"].numel()
            self.work.forward_passes += 1
            levels = logits[:, wanted].double()
            mass = (levels.logsumexp(-1) - logits.logsumexp(-1)).exp()
            for number, probabilities, total in zip(
                numbers, levels.softmax(-1).tolist(), mass.tolist(), strict=True
            ):
                results[number] = TokenDistribution(tuple(probabilities), total)
        return [results[number] for number in range(len(prompts))]

    def close(self) -> None:
        """Does nothing: memory is freed with the last reference to the engine."""


@contextlib.contextmanager
def _fast_products(device: str) -> Iterator[None]:
    """Multiplies float32 matrices as TF32 on a GPU, as long as the context lasts.

    An H100 is then about five times faster. TF32 rounds factors to 10 bits of mantissa, and
    adds up in float32. Emulated on a CPU with the trained R-Scorer of ``tiny`` and 1,062 prompts,
    probabilities moved by 1.4e-3 at most (99.9 %: 5.5e-4, mean: 4e-5), and no verdict changed; with
    bfloat16 they moved by 7.9e-3.
    """
    if device != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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


def encode_rating_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of rating prompts, each up to where the rating token follows."""
    if not prompts:
        return []
    controls = control_tokens(tokenizer)
    # Cleaning every prompt would encode it twice, and few have anything to clean.
    *encoded, empty = _encode(tokenizer, [*prompts, ""])
    own = [token for token in empty if token in controls]
    for number, ids in enumerate(encoded):
        if [token for token in ids if token in controls] != own:
            plain = without_control_tokens(tokenizer, prompts[number])
            (encoded[number],) = _encode(tokenizer, [plain])
    return encoded


def _encode(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    texts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        tokenize=False,
    )
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return encoded
