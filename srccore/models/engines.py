"""Chooses the engine that runs a model."""

from __future__ import annotations

from pathlib import Path

from srccore.method.engine import RatingEngine, SamplingEngine
from srccore.models.device import open_device

__all__ = ["rating_engine", "sampling_engine"]


def sampling_engine(policy: Path, device: str, batch_size: int) -> SamplingEngine:
    """Loads a policy into the engine that samples from it.

    Args:
        policy: A ``policy.json`` or its folder.
        device: ``cpu``, ``cuda`` or ``auto``.
        batch_size: Prompts whose responses are decoded together.

    Returns:
        The engine, on that device.
    """
    from srccore.models.policy import load_policy, read_policy
    from srccore.models.transformers import TransformersSamplingEngine

    loaded = load_policy(read_policy(policy), open_device(device))
    return TransformersSamplingEngine(loaded.model, loaded.processor, batch_size)


def rating_engine(folder: Path, device: str, batch_tokens: int) -> RatingEngine:
    """Loads R-Scorer into the engine that reads its ratings.

    Args:
        folder: A checkpoint that train-scorer wrote.
        device: ``cpu``, ``cuda`` or ``auto``.
        batch_tokens: Most tokens of a forward pass.

    Returns:
        The engine, on that device.
    """
    from srccore.models.rating import TransformersRatingEngine

    return TransformersRatingEngine.load(folder, open_device(device), batch_tokens)
