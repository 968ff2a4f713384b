"""`tune-rationale`: LoRA fine-tuning on rationale, then answer (stage 1 of the paper)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srccore.config import RationaleTuningConfig
from srccore.policy import Policy, load_policy, prompt_text, response_text
from srccore.training import (
    ImageLoader,
    Progress,
    TrainingOutcome,
    image_dataset,
    in_training_dtype,
    lora_config,
    progress_callbacks,
    quiet,
    save_adapter,
    train,
    training_arguments,
    training_device,
    within_context,
)

__all__ = ["RationaleExample", "tune_rationale"]


@dataclass(frozen=True)
class RationaleExample:
    """A question about an image and the response to learn, as `srccore.response.write` makes it."""

    question: str
    response: str
    image: ImageLoader


@dataclass(frozen=True)
class _Row:
    prompt: str
    completion: str
    image: ImageLoader


def tune_rationale(
    policy: Policy,
    examples: Sequence[RationaleExample],
    config: RationaleTuningConfig,
    out: Path,
    *,
    seed: int,
    device: str = "cpu",
    progress: Progress | None = None,
) -> TrainingOutcome:
    """Trains a LoRA adapter on the responses; the loss covers the response and its end only.

    Rank, alpha and learning rate are the preset's (paper: 4, 8 for LLaVA-1.5-7B; 32, 64 for
    LLaVA-NeXT-8B; 1e-5). Linear decay after warm-up and AdamW are a reconstruction.

    Args:
        policy: The policy to start from.
        examples: What to learn from.
        config: The stage's section of the preset.
        out: An existing folder; ``out/adapter`` is written.
        seed: Seeds adapter, order and dropout.
        device: ``cpu`` or ``cuda``.
        progress: Told of every optimiser step.

    Returns:
        Steps, losses, seconds, and how many examples were too long.

    Raises:
        UserError: No example fits into the context, or the policy cannot be loaded.
    """
    from trl import SFTConfig, SFTTrainer

    loaded = load_policy(in_training_dtype(policy, device), training_device(device))
    processor = loaded.processor
    rows = [
        _Row(
            prompt_text(processor, example.question),
            response_text(processor, example.response),
            example.image,
        )
        for example in examples
    ]
    rows = within_context(
        loaded.model, processor, rows, lambda row: (row.prompt, [row.completion], row.image)
    )

    def read(number: int) -> dict[str, Any]:
        row = rows[number]
        return {"prompt": row.prompt, "completion": row.completion, "images": [row.image()]}

    with quiet(), tempfile.TemporaryDirectory(dir=out, prefix=".trainer-") as scratch:
        arguments = training_arguments(
            config,
            out=Path(scratch),
            seed=seed,
            device=device,
            dtype=policy.base.dtype,
            bar=progress is None,
        )
        trainer = SFTTrainer(
            model=loaded.model,
            args=SFTConfig(**arguments, completion_only_loss=True),
            train_dataset=image_dataset(len(rows), read),
            processing_class=processor,
            peft_config=lora_config(config.lora),
            callbacks=progress_callbacks(progress),
        )
        outcome = train(trainer, samples=len(rows), skipped=len(examples) - len(rows))
        save_adapter(trainer, policy.base, out / "adapter")
    return outcome
