"""Exports a policy as one merged checkpoint or one adapter, for tools that take no list of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from srccore.errors import UserError
from srccore.models.folding import read_adapter
from srccore.models.merged import save_merged, save_processor_of
from srccore.models.policy import Policy, load_processor

__all__ = ["export_adapter", "export_merged"]


def export_merged(policy: Policy, out: Path, card: str) -> None:
    """Writes a policy as one self-contained checkpoint.

    Args:
        policy: The policy.
        out: The folder to write.
        card: The text of its ``README.md``.

    Raises:
        UserError: The policy cannot be loaded.
    """
    save_merged(policy, out)
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
    save_processor_of(policy, load_processor(policy.base), out)
    (out / "README.md").write_text(card, encoding="utf-8")


def _shape(name: str, adapters: list[Any]) -> tuple[int, int]:
    a, b = next(adapter.pairs[name] for adapter in adapters if name in adapter.pairs)
    return a.shape[1], b.shape[0]
