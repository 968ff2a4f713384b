"""`train-dpo`: preference fine-tuning with DPO and an SFT term on the chosen response (stage 5)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srccore.config import DpoConfig
from srccore.models.policy import Policy
from srccore.training.machine import Machine
from srccore.training.resume import resumable
from srccore.training.shared_prompt import Collator, share_prompts
from srccore.training.trainer import (
    ImageLoader,
    Row,
    TrainingOutcome,
    final_mean,
    step_figures,
    train_adapter,
)

__all__ = ["DpoOutcome", "PreferenceExample", "dpo_trainer", "train_dpo"]


@dataclass(frozen=True)
class PreferenceExample:
    """A question about an image, the response to prefer and the one to avoid."""

    question: str
    chosen: str
    rejected: str
    image: ImageLoader
    size: tuple[int, int] | None = None
    """As in `srccore.training.trainer.Row`."""


@dataclass(frozen=True)
class DpoOutcome:
    """Result of a DPO run; figures are means over the last steps, before each step's update."""

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
    machine: Machine = Machine(),
) -> DpoOutcome:
    """Trains a new LoRA adapter on preferences.

    The reference is the policy before this training: the same model with the new adapter disabled
    (reconstruction). Beta and the weight of the SFT term come from the preset (paper: 0.1 and
    0.02, as in RPO; rank 256, alpha 512, learning rate 5e-7). The SFT term is a mean over the
    chosen responses of an optimiser step, or over their tokens (`DpoConfig.sft_normalization`),
    however the step is divided among processes and accumulated.

    Args:
        policy: The round's starting policy.
        examples: The preferences.
        config: The stage's section of the preset.
        out: An existing folder; ``out/adapter`` is written.
        seed: Seeds adapter, order and dropout.
        machine: How to train; progress counts optimiser steps.

    Returns:
        Steps, losses, rewards at the end, and the number of examples that were too long.

    Raises:
        UserError: No example fits into the context, or the policy cannot be loaded.
    """
    outcome, trained = train_adapter(
        policy,
        [
            Row(
                each.question,
                {"chosen": each.chosen, "rejected": each.rejected},
                each.image,
                each.size,
            )
            for each in examples
        ],
        config,
        out,
        seed=seed,
        machine=machine,
        trainer=functools.partial(dpo_trainer, config),
    )
    return DpoOutcome(
        training=outcome,
        reward_accuracy=final_mean(step_figures(trained, "rewards/accuracies")),
        reward_margin=final_mean(step_figures(trained, "rewards/margins")),
        chosen_log_probability=final_mean(step_figures(trained, "logps/chosen")),
        rejected_log_probability=final_mean(step_figures(trained, "logps/rejected")),
    )


def dpo_trainer(config: DpoConfig, arguments: dict[str, Any], **parts: Any) -> Any:
    """Makes the trainer of `train_dpo`: TRL's, for rows with a shared prompt.

    Args:
        config: The stage's section of the preset.
        arguments: Those of `srccore.training.trainer.Session`.
        parts: The model, data set, processor and settings of LoRA, as TRL's trainer takes them.
    """
    from trl import DPOConfig, DPOTrainer

    share_prompts(parts["model"])
    return _sft_normalised(resumable(DPOTrainer), config)(
        args=DPOConfig(
            **arguments,
            beta=config.beta,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, config.sft_weight],
            # TRL would switch off the adapter's dropout. The reference has none: its adapter is
            # disabled, and `train_adapter` switches the checkpoint's own off.
            disable_dropout=False,
        ),
        data_collator=Collator(parts["processing_class"], ("chosen", "rejected")),
        **parts,
    )


def _sft_normalised(trainer: type[Any], config: DpoConfig) -> type[Any]:
    """Makes a DPO trainer class whose SFT term does not depend on how a step is divided.

    TRL takes the mean over the tokens of one forward pass. Trainer and DDP then average these
    means over forward passes and processes, so each is weighted here: by the tokens per response
    of its pass (all passes have equally many responses), or by its share of the step's tokens.

    Args:
        trainer: TRL's class.
        config: The weight of the term, and what it is a mean over.
    """

    class PerResponse(trainer):  # type: ignore[misc]  # TRL is read without types
        def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
            tokens, responses = _chosen(inputs)
            self.loss_weights = [1.0, config.sft_weight * tokens / responses]
            return super().compute_loss(model, inputs, *given, **named)

    class PerToken(trainer):  # type: ignore[misc]
        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            own = sum(_chosen(batch)[0] for batch in batches).to(device)
            return batches, self.accelerator.gather(own).sum()

        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            means = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            share = means * _chosen(inputs)[0] / num_items_in_batch
            self.loss_weights = [1.0, config.sft_weight * share]
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    return PerToken if config.sft_normalization == "token" else PerResponse


def _chosen(batch: Any) -> tuple[Any, int]:
    """Counts tokens and responses of the chosen half: the first half of the rows, as in TRL."""
    chosen, _ = batch["completion_mask"].chunk(2)
    return chosen[:, 1:].sum(), len(chosen)
