"""R-Scorer's training with plain TRL: padded prompts, and a label on the rating token only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srccore.config import ScorerConfig, TextModelConfig
from srccore.data.records import RATING_LEVELS
from srccore.models.policy import resolve_model_path
from srccore.models.rating import encode_rating_prompts, single_token
from srccore.training.machine import Machine
from srccore.training.resume import resumable
from srccore.training.scorer import TEXT_MODEL_TARGETS, RatingExample
from srccore.training.trainer import lora_config, sample_order, step_figures, training

__all__ = ["train"]


def train(
    base: TextModelConfig,
    examples: Sequence[RatingExample],
    config: ScorerConfig,
    out: Path,
    *,
    seed: int,
    machine: Machine = Machine(),
) -> list[float]:
    """Trains on a CPU, in the same order and with the same settings as `train_scorer`.

    Returns:
        The loss of each optimiser step.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    path = resolve_model_path(base.path)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    ratings = {level: single_token(tokenizer, str(level)) for level in RATING_LEVELS}
    prompts = encode_rating_prompts(tokenizer, [example.prompt for example in examples])
    rows = {
        "input_ids": [
            [*prompt, ratings[example.rating]]
            for prompt, example in zip(prompts, examples, strict=True)
        ],
        "labels": [
            [-100] * len(prompt) + [ratings[example.rating]]
            for prompt, example in zip(prompts, examples, strict=True)
        ],
    }
    with training(config, out, dtype=base.dtype, seed=seed, machine=machine) as session:
        trainer = resumable(SFTTrainer)(
            model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            args=SFTConfig(**session.arguments),
            train_dataset=Dataset.from_dict(rows).select(sample_order(len(prompts), config, seed)),
            processing_class=tokenizer,
            peft_config=lora_config(config.lora, TEXT_MODEL_TARGETS) if config.lora else None,
        )
        session.run(trainer, samples=len(prompts), skipped=0)
    return step_figures(trainer, "loss")
