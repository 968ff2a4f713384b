"""`train-dpo`: preference fine-tuning with DPO and an SFT term on the chosen response (stage 5)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srccore.config import DpoConfig
from srccore.data.records import Candidate
from srccore.errors import UserError
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

OTHER_POLICY = 0.1
"""Log-probabilities of one policy differ by less per token, whatever the kernels and precision."""


@dataclass(frozen=True)
class PreferenceExample:
    """A question about an image, the response to prefer and the one to avoid.

    A candidate is trained as it was drawn, byte by byte; other texts are written as in stage 1.
    """

    question: str
    chosen: str | Candidate
    rejected: str | Candidate
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
        UserError: No example fits into the context, the policy cannot be loaded, or
            ``reference: drawn`` finds log-probabilities of another policy.
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

    counted = share_prompts(parts["model"])
    trainer = _sft_normalised(_with_memory(resumable(DPOTrainer), config), config)(
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
    trainer.counted = counted
    return trainer


def _with_memory(trainer: type[Any], config: DpoConfig) -> type[Any]:
    """Makes a DPO trainer class that computes the reference once per preference, or not at all.

    TRL computes it in every epoch, and precomputes it only for texts. A pass before the training
    would encode every image again; here, the first epoch computes what its batches need, with
    the layout and the kernels of the policy, so that log ratios start from 0 exactly.

    Args:
        trainer: A class of `resumable`.
        config: Whether log-probabilities of the search are used.
    """
    import torch

    class WithMemory(trainer):  # type: ignore[misc]  # TRL is read without types
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            # TRL's loss reads the reference from the batch then.
            self.precompute_ref_logps = True
            rows = max(self.train_dataset.with_format(None)["row"]) + 1
            self.memory = {"reference": torch.full((rows, 2), torch.nan)}
            self.is_unchecked = config.reference == "drawn"

        def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
            chosen, rejected = self._reference(inputs).unbind(1)
            inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            return super().compute_loss(model, inputs, *given, **named)

        def _reference(self, inputs: Any) -> torch.Tensor:
            """Returns (pairs, 2), the log-probabilities of chosen and rejected responses."""
            rows, drawn = inputs.pop("row"), inputs.pop("drawn")
            table = self.memory["reference"]
            found = table[rows.cpu()].to(rows.device)
            if config.reference == "drawn":
                found = torch.where(found.isnan(), drawn, found)
            is_missing = found.isnan()
            # All processes or none: the pass is collective where the model is sharded.
            if self.accelerator.gather((is_missing.any() | self.is_unchecked)[None]).any():
                computed = torch.stack(self.compute_ref_log_probs(self.model, inputs), 1).float()
                if self.is_unchecked:
                    self._check((found - computed).abs() / _tokens(inputs))
                found = torch.where(is_missing, computed, found)
                every = self.accelerator.gather(rows), self.accelerator.gather(found)
                table[every[0].cpu()] = every[1].cpu()
            return found

        def _check(self, differences: torch.Tensor) -> None:
            """Refuses log-probabilities that another policy has computed."""
            mean = float(self.accelerator.gather(differences).nanmean())
            # A batch in which nothing was drawn shows nothing.
            self.is_unchecked = math.isnan(mean)
            if mean > OTHER_POLICY:
                raise UserError(
                    "The preferences' log-probabilities are not those of this policy: they differ "
                    f"by {mean:.2g} per token in the first batch.",
                    "Pass the policy that the candidates were searched with, or set dpo.reference "
                    "to computed.",
                )

    return WithMemory


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


def _tokens(batch: Any) -> Any:
    """Counts the tokens of each response: (pairs, 2), chosen and rejected."""
    return batch["completion_mask"].sum(1).view(2, -1).T


def _chosen(batch: Any) -> tuple[Any, int]:
    """Counts tokens and responses of the chosen half: the first half of the rows, as in TRL."""
    chosen, _ = batch["completion_mask"].chunk(2)
    return chosen[:, 1:].sum(), len(chosen)
