"""`train-scorer`: R-Scorer, a text-only language model trained on one rating token per prompt.

The prompts of a forward pass are packed into one row (`srccore.models.packing`): nothing is padded,
what prompts share at their start is computed once, and the head sees one position per prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srccore.config import ScorerConfig, TextModelConfig
from srccore.data.records import RATING_LEVELS
from srccore.errors import UserError
from srccore.method.engine import Work
from srccore.models.policy import load_weights, loading, resolve_model_path
from srccore.training.machine import Machine
from srccore.training.resume import resumable
from srccore.training.trainer import (
    TrainingOutcome,
    final_mean,
    lora_config,
    sample_order,
    step_figures,
    training,
)

__all__ = ["RatingExample", "ScorerOutcome", "train_scorer"]

TEXT_MODEL_TARGETS = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class RatingExample:
    """A user message of `srccore.method.scoring.rating_prompt`, and the rating that follows it."""

    prompt: str
    rating: int


@dataclass(frozen=True)
class ScorerOutcome:
    """Result of a scorer run."""

    training: TrainingOutcome
    rating_accuracy: float
    """Share of ratings that were the most likely token, mean over the last steps."""


def train_scorer(
    base: TextModelConfig,
    examples: Sequence[RatingExample],
    config: ScorerConfig,
    out: Path,
    *,
    seed: int,
    machine: Machine = Machine(),
) -> ScorerOutcome:
    """Trains R-Scorer; the loss is on the rating token only (reconstruction).

    The paper fine-tunes Qwen2.5-1.5B. Either all weights are trained, or a LoRA adapter that is
    merged at the end. What is trained, merged and stored is float32: bfloat16 would round small
    updates away. That takes 6 GB of disk for 1.5B parameters. With LoRA, the base stays in its own
    type on a GPU while it is trained.

    Args:
        base: The text model to start from.
        examples: Prompts and ratings. The engine's own function wraps a prompt in the tokenizer's
            chat template, so training and scoring see the same token ids.
        config: The stage's section of the preset.
        out: An existing folder; ``out/model`` is written in Hugging Face layout.
        seed: Seeds order, dropout and adapter.
        machine: How to train; progress counts optimiser steps.

    Returns:
        Steps, losses, accuracy at the end, and the number of examples that were too long.

    Raises:
        UserError: A rating is not one token, no example fits into the context, or the model's
            attention cannot be packed.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig

    from srccore.models.packing import use_packing
    from srccore.models.rating import single_token

    path = resolve_model_path(base.path)
    with loading(path):
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=base.revision, trust_remote_code=False
        )
    ratings = {level: single_token(tokenizer, str(level)) for level in RATING_LEVELS}
    with training(config, out, dtype=base.dtype, seed=seed, machine=machine) as session:
        on_gpu = session.device.startswith("cuda")
        model = load_weights(
            AutoModelForCausalLM,
            path,
            revision=base.revision,
            dtype=getattr(torch, base.dtype) if on_gpu and config.lora else torch.float32,
            # Straight to the device: every rank would hold a copy in the node's memory.
            device_map={"": session.device},
        )
        rows = _rows(examples, tokenizer, ratings, model.config.max_position_embeddings)
        samples = len(rows["input_ids"])
        session.processes.agree(map(str, zip(*rows.values(), strict=True)), "prompts or ratings")
        use_packing(model)
        trainer = _trainer_class()(
            model=model,
            args=SFTConfig(**session.arguments),
            train_dataset=Dataset.from_dict(rows).select(sample_order(samples, config, seed)),
            data_collator=_pack,
            processing_class=tokenizer,
            peft_config=lora_config(config.lora, TEXT_MODEL_TARGETS) if config.lora else None,
        )
        outcome = session.run(trainer, samples=samples, skipped=len(examples) - samples)
        if session.processes.is_first:
            trained = trainer.accelerator.unwrap_model(trainer.model)
            if config.lora:
                trained = trained.float().merge_and_unload()
            trained.save_pretrained(out / "model")
            tokenizer.save_pretrained(out / "model")
    return ScorerOutcome(
        training=outcome,
        rating_accuracy=final_mean(step_figures(trainer, "mean_token_accuracy")),
    )


def _pack(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collates rows of `_rows`."""
    import torch

    from srccore.models.packing import pack

    ratings = torch.tensor([example["rating"] for example in examples])
    return {**pack([example["input_ids"] for example in examples]), "ratings": ratings}


def _trainer_class() -> Any:
    """Makes the trainer class whose loss is on the ratings of a packed row."""
    from torch.nn.functional import cross_entropy
    from trl import SFTTrainer

    class RatingTrainer(resumable(SFTTrainer)):  # type: ignore[misc]  # read without types
        # A mean per forward pass: all have the same number of prompts (`sample_order`).
        loss_is_scaled_for_ga = False

        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self.work = Work()

        def counted(self) -> Work:
            return self.work

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
        ) -> Any:
            ratings = inputs.pop("ratings")
            logits = model(**inputs).logits[0].float()
            tokens = inputs["input_ids"].numel()
            self.work.add(Work(len(ratings), prefilled_tokens=tokens, forward_passes=1))
            is_right = self.accelerator.gather((logits.argmax(-1) == ratings).float())
            self._metrics["train"]["mean_token_accuracy"].append(is_right.mean().item())
            return cross_entropy(logits, ratings)

    return RatingTrainer


def _rows(
    examples: Sequence[RatingExample], tokenizer: Any, ratings: dict[int, int], limit: int
) -> dict[str, list[Any]]:
    """Makes token ids of the examples that fit: prompts, and the rating token after each."""
    from srccore.models.rating import encode_rating_prompts

    encoded = encode_rating_prompts(tokenizer, [example.prompt for example in examples])
    kept = [
        (prompt, ratings[example.rating])
        for example, prompt in zip(examples, encoded, strict=True)
        if len(prompt) < limit
    ]
    if not kept:
        raise UserError(
            f"None of {len(examples)} rating prompts fits into the model's context of {limit} "
            "tokens.",
            "Pass at least one pair that fits, or use a rating model with a longer context.",
        )
    return {"input_ids": [ids for ids, _ in kept], "rating": [rating for _, rating in kept]}
