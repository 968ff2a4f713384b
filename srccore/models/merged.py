"""Writes a policy as one checkpoint, with the weight names of public checkpoints.

transformers, vLLM and the evaluation harnesses all read these. For LLaVA they are
``vision_tower.vision_model.*`` and ``language_model.model.*``, which transformers 5 itself writes
partly renamed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from srccore.models.families import save_processor
from srccore.models.policy import (
    LoadedPolicy,
    Policy,
    checkpoint_family,
    load_policy,
    resolve_model_path,
)

__all__ = ["public_name", "save_in_public_names", "save_merged", "save_processor_of"]

_RENAMED = ("llava", "llava_next")
"""The families whose public names `save_pretrained` does not write."""
# First match wins; in memory (transformers 5) -> in public checkpoints.
_PUBLIC_PREFIXES = {
    "model.vision_tower.vision_model.": "vision_tower.vision_model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.language_model.": "language_model.model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}


def public_name(name: str) -> str:
    """Returns the name that a weight of a LLaVA model has in public checkpoints.

    Args:
        name: Its name in the ``state_dict`` of transformers 5.

    Raises:
        ValueError: The model is not of the LLaVA family with a CLIP or SigLIP tower.
    """
    for prefix, public in _PUBLIC_PREFIXES.items():
        if name.startswith(prefix):
            return public + name.removeprefix(prefix)
    raise ValueError(f"{name} is not a weight of a LLaVA model")


def save_in_public_names(model: Any, out: Path) -> None:
    """Writes a model in Hugging Face layout (safetensors) with public names.

    Args:
        model: A model of one of `srccore.models.families`.
        out: The folder to write.
    """
    from huggingface_hub import save_torch_state_dict

    if model.config.model_type not in _RENAMED:
        model.save_pretrained(out)
        return
    out.mkdir(parents=True, exist_ok=True)
    weights = {public_name(name): tensor for name, tensor in model.state_dict().items()}
    save_torch_state_dict(weights, out, metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.save_pretrained(out)
    model.generation_config.save_pretrained(out)


def save_merged(policy: Policy, out: Path) -> LoadedPolicy:
    """Writes a policy as one self-contained checkpoint, in the type of its base model.

    Args:
        policy: The policy.
        out: The folder to write.

    Returns:
        The policy as it was written, on the CPU.

    Raises:
        UserError: The policy cannot be loaded.
    """
    loaded = load_policy(policy)
    save_in_public_names(loaded.model, out)
    save_processor_of(policy, loaded.processor, out)
    return loaded


def save_processor_of(policy: Policy, processor: Any, out: Path) -> None:
    """Writes the processor of a policy into a checkpoint.

    Args:
        policy: The policy.
        processor: Its processor.
        out: The folder to write.
    """
    source = resolve_model_path(policy.base.path)
    save_processor(processor, out, checkpoint_family(policy.base), source, policy.base.revision)
