"""`train-dpo`: preference fine-tuning with DPO and an SFT term on the chosen response (stage 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from srccore.config import DpoConfig
from srccore.policy import Policy, prompt_text, response_text
from srccore.training import (
    ImageLoader,
    Progress,
    Row,
    TrainingOutcome,
    final_mean,
    step_figures,
    train_adapter,
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

    outcome, trainer = train_adapter(
        policy,
        lambda processor: [
            Row(
                prompt_text(processor, example.question),
                {
                    "chosen": response_text(processor, example.chosen),
                    "rejected": response_text(processor, example.rejected),
                },
                example.image,
            )
            for example in examples
        ],
        config,
        out,
        lora=config.lora,
        seed=seed,
        device=device,
        progress=progress,
        trainer=lambda arguments, **parts: DPOTrainer(
            args=DPOConfig(
                **arguments,
                beta=config.beta,
                loss_type=["sigmoid", "sft"],
                loss_weights=[1.0, config.sft_weight],
            ),
            **parts,
        ),
    )
    return DpoOutcome(
        training=outcome,
        reward_accuracy=final_mean(step_figures(trainer, "rewards/accuracies")),
        reward_margin=final_mean(step_figures(trainer, "rewards/margins")),
        chosen_log_probability=final_mean(step_figures(trainer, "logps/chosen")),
        rejected_log_probability=final_mean(step_figures(trainer, "logps/rejected")),
    )
