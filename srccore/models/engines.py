"""Chooses the engine that runs a model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from srccore.config import EngineConfig
from srccore.errors import UserError
from srccore.method.engine import RatingEngine, SamplingEngine
from srccore.models.device import open_device

__all__ = ["check_installed", "rating_engine", "sampling_engine"]


def check_installed(config: EngineConfig) -> None:
    """Refuses an engine that this environment does not have.

    Raises:
        UserError: It is vLLM, which needs an environment or an image of its own.
    """
    if config.name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "engine.name is vllm, but vLLM is not installed in this environment.",
            "Use the environment of make vllm-env, in a pipeline the image vllm, or pass --set "
            "engine.name=transformers.",
        )


def sampling_engine(
    policy: Path,
    device: str,
    config: EngineConfig = EngineConfig(),
    *,
    draws: int = 1,
) -> SamplingEngine:
    """Loads a policy into the engine that samples from it.

    Args:
        policy: A ``policy.json`` or its folder.
        device: ``cpu``, ``cuda`` or ``auto``.
        config: Which engine, and its settings.
        draws: Responses that a prompt usually waits for at the same time.

    Returns:
        The engine, on that device.

    Raises:
        UserError: The engine is not installed, or the policy cannot be loaded.
    """
    from srccore.models.policy import load_policy, read_policy

    check_installed(config)
    if config.name == "vllm":
        from srccore.models.vllm import VllmSamplingEngine

        return VllmSamplingEngine(read_policy(policy), open_device(device), config, draws)
    from srccore.models.transformers import TransformersSamplingEngine

    loaded = load_policy(read_policy(policy), open_device(device))
    return TransformersSamplingEngine(loaded.model, loaded.processor)


def rating_engine(
    folder: Path, device: str, batch_tokens: int, config: EngineConfig = EngineConfig()
) -> RatingEngine:
    """Loads R-Scorer into the engine that reads its ratings.

    Args:
        folder: A checkpoint that train-scorer wrote.
        device: ``cpu``, ``cuda`` or ``auto``.
        batch_tokens: Most tokens of a forward pass, by an engine that has batches.
        config: Which engine, and its settings.

    Returns:
        The engine, on that device.

    Raises:
        UserError: The engine is not installed.
    """
    check_installed(config)
    if config.name == "vllm":
        from srccore.models.vllm import VllmRatingEngine

        return VllmRatingEngine(folder, open_device(device), config)
    from srccore.models.rating import TransformersRatingEngine

    return TransformersRatingEngine.load(folder, open_device(device), batch_tokens)
