"""Exports a policy as one merged checkpoint or one adapter, for tools that take no list of them.

A checkpoint is written with the weight names of public checkpoints, which transformers, vLLM and
the evaluation harnesses all read. For LLaVA these are ``vision_tower.vision_model.*`` and
``language_model.model.*``, which transformers 5 itself writes partly renamed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from srccore.errors import UserError
from srccore.models.families import save_processor
from srccore.models.folding import read_adapter
from srccore.models.policy import (
    Policy,
    checkpoint_family,
    load_policy,
    load_processor,
    resolve_model_path,
)

__all__ = ["export_adapter", "export_merged", "public_name", "save_in_public_names"]

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


def export_merged(policy: Policy, out: Path, card: str) -> None:
    """Writes a policy as one self-contained checkpoint.

    Args:
        policy: The policy.
        out: The folder to write.
        card: The text of its ``README.md``.

    Raises:
        UserError: The policy cannot be loaded.
    """
    loaded = load_policy(policy)
    save_in_public_names(loaded.model, out)
    _save_processor(loaded.processor, policy, out)
    (out / "README.md").write_text(card, encoding="utf-8")


def export_adapter(policy: Policy, out: Path, card: str) -> None:
    """Writes the policy's adapters as one PEFT adapter that equals their sum.

    The matrices are concatenated along the rank, with each adapter's scale multiplied into B: the
    rank is the sum of the ranks and the scale is 1. Kept in float32.

    Args:
        policy: A policy with at least one adapter.
        out: The folder to write.
        card: The text of its ``README.md``.

    Raises:
        UserError: The policy has no adapter, or one is not plain LoRA.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    if not policy.adapters:
        raise UserError(
            "The policy has no adapter to export.", "Export it merged, or train it first."
        )
    adapters = [read_adapter(path) for path in policy.adapters]
    ranks = [next(iter(adapter.pairs.values()))[0].shape[0] for adapter in adapters]
    names = sorted({name for adapter in adapters for name in adapter.pairs})
    tensors = {}
    for name in names:
        inputs, outputs = _shape(name, adapters)
        left, right = [], []
        for adapter, rank in zip(adapters, ranks, strict=True):
            # PEFT requires the same rank everywhere: an adapter without the module adds zeros.
            nothing = (torch.zeros(rank, inputs), torch.zeros(outputs, rank))
            a, b = adapter.pairs.get(name, nothing)
            left.append(a.float())
            right.append(adapter.scale * b.float())
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.cat(left).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.cat(right, 1).contiguous()
    targets = adapters[0].target_modules
    same = all(adapter.target_modules == targets for adapter in adapters)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=sum(ranks),
        lora_alpha=sum(ranks),
        target_modules=targets if same else names,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=policy.base.path,
        revision=policy.base.revision,
    ).save_pretrained(str(out))
    _save_processor(load_processor(policy.base), policy, out)
    (out / "README.md").write_text(card, encoding="utf-8")


def _save_processor(processor: Any, policy: Policy, out: Path) -> None:
    source = resolve_model_path(policy.base.path)
    save_processor(processor, out, checkpoint_family(policy.base), source, policy.base.revision)


def _shape(name: str, adapters: list[Any]) -> tuple[int, int]:
    a, b = next(adapter.pairs[name] for adapter in adapters if name in adapter.pairs)
    return a.shape[1], b.shape[0]
