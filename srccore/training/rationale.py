"""`tune-rationale`: LoRA fine-tuning on rationale, then answer (stage 1 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srccore.config import RationaleTuningConfig
from srccore.models.policy import Policy
from srccore.training.machine import Machine
from srccore.training.resume import resumable
from srccore.training.shared_prompt import Collator, share_prompts
from srccore.training.trainer import ImageLoader, Row, TrainingOutcome, train_adapter

__all__ = ["RationaleExample", "tune_rationale"]


@dataclass(frozen=True)
class RationaleExample:
    """A question about an image and the response to learn (`srccore.method.response.write`)."""

    question: str
    response: str
    image: ImageLoader
    size: tuple[int, int] | None = None
    """As in `srccore.training.trainer.Row`."""


def tune_rationale(
    policy: Policy,
    examples: Sequence[RationaleExample],
    config: RationaleTuningConfig,
    out: Path,
    *,
    seed: int,
    machine: Machine = Machine(),
) -> TrainingOutcome:
    """Trains a LoRA adapter on the responses; the loss covers the response and its end only.

    Rank, alpha and learning rate come from the preset (paper: 4, 8 for LLaVA-1.5-7B; 32, 64 for
    LLaVA-NeXT-8B; 1e-5). Linear decay after warm-up and AdamW are a reconstruction.

    Args:
        policy: The policy to start from.
        examples: What to learn from.
        config: The stage's section of the preset.
        out: An existing folder; ``out/adapter`` is written.
        seed: Seeds adapter, order and dropout.
        machine: How to train; progress counts optimiser steps.

    Returns:
        Steps, losses, seconds, and the number of examples that were too long.

    Raises:
        UserError: No example fits into the context, or the policy cannot be loaded.
    """
    outcome, _ = train_adapter(
        policy,
        [
            Row(each.question, {"completion": each.response}, each.image, each.size)
            for each in examples
        ],
        config,
        out,
        seed=seed,
        machine=machine,
        trainer=_sft_trainer,
    )
    return outcome


def _sft_trainer(arguments: dict[str, Any], **parts: Any) -> Any:
    """Makes TRL's trainer, for the batches of `Collator`."""
    from trl import SFTConfig, SFTTrainer

    counted = share_prompts(parts["model"])
    trainer = resumable(SFTTrainer)(
        args=SFTConfig(**arguments, completion_only_loss=True),
        data_collator=Collator(parts["processing_class"], ("completion",)),
        **parts,
    )
    trainer.counted = counted
    return trainer
