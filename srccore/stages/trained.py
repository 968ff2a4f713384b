"""The policy that a training has just made, loaded as later stages load it, and checked."""

from __future__ import annotations

import dataclasses
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from srccore.errors import UserError
from srccore.method.engine import Work
from srccore.models.device import open_device
from srccore.models.folding import Share
from srccore.models.policy import LoadedPolicy, Policy, load_policy
from srccore.training.machine import Figures, Machine

if TYPE_CHECKING:
    from srccore.training.dpo import DpoOutcome
    from srccore.training.scorer import ScorerOutcome
    from srccore.training.trainer import TrainingOutcome

__all__ = ["check_kept", "figures_and_work", "free_training_memory", "load_trained"]

WARN_BELOW, FAIL_BELOW = 0.9, 0.5
"""Limits of the share of an adapter that is left after rounding (reconstruction)."""


def load_trained(policy: Policy, machine: Machine) -> LoadedPolicy:
    """Loads a policy whose newest adapter this process has just trained.

    The memory of the training is freed first: two models of 7B take 28 GB in bfloat16.

    Args:
        policy: The policy, with the new adapter.
        machine: The device that it was trained on.

    Returns:
        The policy, with a folding.
    """
    free_training_memory()
    return load_policy(policy, open_device(machine.device))


def free_training_memory() -> None:
    """Frees the model and the optimiser of a training that has returned."""
    import torch

    # A trainer refers to itself, so it is not freed when its last user returns.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def figures_and_work(outcome: TrainingOutcome | ScorerOutcome | DpoOutcome) -> tuple[Figures, Work]:
    """Divides the result of a training for `srccore.stages.folder.StageFolder.finish`."""
    figures = dataclasses.asdict(outcome)
    return figures, Work(**figures.get("training", figures).pop("work"))


def check_kept(kept: Share, *, adapter: Path, dtype: str, section: str) -> None:
    """Warns on stderr if part of a trained adapter is lost when it is folded into the weights.

    Args:
        kept: What is left of the adapter.
        adapter: Its folder.
        dtype: The type of the weights.
        section: The section of the preset with the training's settings.

    Raises:
        UserError: Most of it is lost, so later stages would not see what was learned.
    """
    advice = (
        f"Take more optimiser steps (a smaller {section}.gradient_accumulation_steps or "
        f"{section}.batch_size), a higher {section}.learning_rate, or a finer model.dtype "
        "(float16 or float32)."
    )
    share = f"{kept.projection:.0%}"
    # Written so that NaN fails, too.
    if not kept.projection >= FAIL_BELOW:
        raise UserError(
            f"Folding into {dtype} weights keeps {share} of the adapter {adapter}: it changes them "
            "by too little.",
            advice,
        )
    if kept.projection < WARN_BELOW:
        print(
            f"Folding into {dtype} weights keeps {share} of the adapter {adapter}. {advice}",
            file=sys.stderr,
        )
