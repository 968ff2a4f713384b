"""Plain n-sampling with vLLM's own offline interface: ``n`` responses per request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srccore.method.engine import Prompt
from srccore.models.policy import prompt_text

__all__ = ["OfflineSampling"]


class OfflineSampling:
    """vLLM's `LLM`, with the prefix cache and image identifiers that it offers.

    Args:
        checkpoint: A merged policy.
        processor: Its processor, for the chat template.
        max_length: The longest sequence.
        sequences: Responses that are decoded at the same time.
    """

    def __init__(self, checkpoint: Path, processor: Any, max_length: int, sequences: int) -> None:
        from vllm import LLM

        self._processor = processor
        self._llm = LLM(
            str(checkpoint),
            dtype="float32",
            max_model_len=max_length,
            max_num_seqs=sequences,
            limit_mm_per_prompt={"image": 1},
            enforce_eager=True,
            enable_chunked_prefill=False,
            block_size=32,
        )

    def __call__(self, prompts: Sequence[Prompt], count: int, max_tokens: int) -> int:
        """Samples responses; returns the number of tokens."""
        from vllm import SamplingParams

        asked = [
            {
                "prompt": prompt_text(self._processor, prompt.question),
                "multi_modal_data": {"image": prompt.image()},
                "multi_modal_uuids": {"image": prompt.key},
            }
            for prompt in prompts
        ]
        settings = SamplingParams(n=count, max_tokens=max_tokens, temperature=1.0, logprobs=0)
        made = self._llm.generate(asked, settings, use_tqdm=False)
        return sum(len(each.token_ids) for output in made for each in output.outputs)
