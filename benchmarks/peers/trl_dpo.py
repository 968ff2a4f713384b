"""DPO as TRL 1.16 does it for images: its trainer, its collator, a row per response.

Tuned as far as its settings go: the same adapter, precision and batches as ours, the reference by
disabling the adapter (no second model), the fused head, no truncation, no padding to a fixed
length. ``precompute_ref_log_probs`` is refused for images.
"""

from __future__ import annotations

from typing import Any

from srccore.config import DpoConfig
from srccore.training.resume import resumable


def trl_trainer(config: DpoConfig, arguments: dict[str, Any], **parts: Any) -> Any:
    """Makes TRL's trainer, for `srccore.training.trainer.train_adapter`.

    Args:
        config: Beta and the weight of the SFT term, which TRL takes the mean of over the tokens of
            a forward pass.
        arguments: What TRL's trainers share.
        parts: The model, data set, processor and settings of LoRA.
    """
    from trl import DPOConfig, DPOTrainer

    return resumable(DPOTrainer)(
        args=DPOConfig(
            **arguments,
            beta=config.beta,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, config.sft_weight],
        ),
        **parts,
    )
