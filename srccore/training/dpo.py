"""`train-dpo`: preference fine-tuning with DPO and an SFT term on the chosen response (stage 5)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srccore.config import DpoConfig
from srccore.policy import Policy, load_policy, prompt_text, response_text
from srccore.training import (
    ImageLoader,
    Progress,
    TrainingOutcome,
    final_mean,
    image_dataset,
    in_training_dtype,
    lora_config,
    progress_callbacks,
    quiet,
    save_adapter,
    step_figures,
    train,
    training_arguments,
    training_device,
    within_context,
)

__all__ = ["DpoOutcome", "PreferenceExample", "train_dpo"]


@dataclass(frozen=True)
class PreferenceExample:
    """A question about an image, the response to prefer and the one to avoid."""

    question: str
    chosen: str
    rejected: str
    image: ImageLoader


@dataclass(frozen=True)
class DpoOutcome:
    """What a DPO run did; figures are means over the last steps, before each step's update."""

    training: TrainingOutcome
    reward_accuracy: float
    """Share of pairs whose chosen response has the higher implicit reward."""
    reward_margin: float
    """Chosen minus rejected implicit reward (beta times the log ratio to the reference)."""
    chosen_log_probability: float
    """Sum over the chosen response's tokens, natural log, mean over pairs."""
    rejected_log_probability: float


@dataclass(frozen=True)
class _Row:
    prompt: str
    chosen: str
    rejected: str
    image: ImageLoader


def train_dpo(
    policy: Policy,
    examples: Sequence[PreferenceExample],
    config: DpoConfig,
    out: Path,
    *,
    seed: int,
    device: str = "cpu",
    progress: Progress | None = None,
) -> DpoOutcome:
    """Trains a new LoRA adapter on preferences.

    The reference is the policy as it comes in: the same model with the new adapter disabled
    (reconstruction). Beta and the weight of the SFT term are the preset's (paper: 0.1 and 0.02,
    as in RPO; rank 256, alpha 512, learning rate 5e-7).

    Args:
        policy: The round's starting policy.
        examples: The preferences.
        config: The stage's section of the preset.
        out: An existing folder; ``out/adapter`` is written.
        seed: Seeds adapter, order and dropout.
        device: ``cpu`` or ``cuda``.
        progress: Told of every optimiser step.

    Returns:
        Steps, losses, rewards at the end, and how many examples were too long.

    Raises:
        UserError: No example fits into the context, or the policy cannot be loaded.
    """
    from trl import DPOConfig, DPOTrainer

    loaded = load_policy(in_training_dtype(policy, device), training_device(device))
    processor = loaded.processor
    rows = [
        _Row(
            prompt_text(processor, example.question),
            response_text(processor, example.chosen),
            response_text(processor, example.rejected),
            example.image,
        )
        for example in examples
    ]
    rows = within_context(
        loaded.model,
        processor,
        rows,
        lambda row: (row.prompt, [row.chosen, row.rejected], row.image),
    )

    def read(number: int) -> dict[str, Any]:
        row = rows[number]
        return {
            "prompt": row.prompt,
            "chosen": row.chosen,
            "rejected": row.rejected,
            "images": [row.image()],
        }

    with quiet(), tempfile.TemporaryDirectory(dir=out, prefix=".trainer-") as scratch:
        arguments = training_arguments(
            config,
            out=Path(scratch),
            seed=seed,
            device=device,
            dtype=policy.base.dtype,
            bar=progress is None,
        )
        trainer = DPOTrainer(
            model=loaded.model,
            args=DPOConfig(
                **arguments,
                beta=config.beta,
                loss_type=["sigmoid", "sft"],
                loss_weights=[1.0, config.sft_weight],
            ),
            train_dataset=image_dataset(len(rows), read),
            processing_class=processor,
            peft_config=lora_config(config.lora),
            callbacks=progress_callbacks(progress),
        )
        outcome = train(trainer, samples=len(rows), skipped=len(examples) - len(rows))
        save_adapter(trainer, policy.base, out / "adapter")
    return DpoOutcome(
        training=outcome,
        reward_accuracy=final_mean(step_figures(trainer, "rewards/accuracies")),
        reward_margin=final_mean(step_figures(trainer, "rewards/margins")),
        chosen_log_probability=final_mean(step_figures(trainer, "logps/chosen")),
        rejected_log_probability=final_mean(step_figures(trainer, "logps/rejected")),
    )
