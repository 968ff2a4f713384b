"""The families of vision-language models that a policy may be of, and what differs between them.

A family is the ``model_type`` of a checkpoint's ``config.json``. Every stage is tested on a tiny
checkpoint of each (``tests/awkward``). Others are refused by name: their checkpoints may load, but
nobody has checked that training and search read their images, positions and turns alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from srccore.errors import UserError

__all__ = ["FAMILIES", "Family", "family_of", "image_only", "language_model_targets"]


@dataclass(frozen=True)
class Family:
    """What the package has to know of a family beyond what its model and processor say.

    Attributes:
        language_model: The name of the language model inside the model.
        example: A public checkpoint.
    """

    language_model: str
    example: str


FAMILIES: Mapping[str, Family] = {
    "llava": Family("model.language_model", "llava-hf/llava-1.5-7b-hf"),
    "llava_next": Family("model.language_model", "llava-hf/llama3-llava-next-8b-hf"),
    "qwen2_5_vl": Family("model.language_model", "Qwen/Qwen2.5-VL-7B-Instruct"),
    "idefics3": Family("model.text_model", "HuggingFaceTB/SmolVLM-500M-Instruct"),
    "internvl": Family("model.language_model", "OpenGVLab/InternVL3-1B-hf"),
}
"""By ``model_type``."""


def family_of(model_type: str | None, path: str) -> Family:
    """Returns the family of a checkpoint.

    Args:
        model_type: As its ``config.json`` says.
        path: The checkpoint, for the error.

    Raises:
        UserError: The family is not one of `FAMILIES`.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    tested = ", ".join(f"{name} ({family.example})" for name, family in FAMILIES.items())
    raise UserError(
        f"The checkpoint {path} is of the family {model_type!r}, which is not tested.",
        f"Use one of {tested}.",
    )


def language_model_targets(model: Any) -> str:
    """Returns the pattern of the linear layers that LoRA trains: those of the language model.

    Names like ``q_proj`` alone would also match the vision tower, which vLLM cannot adapt.

    Args:
        model: A model of one of `FAMILIES`, not wrapped.
    """
    inside = FAMILIES[model.config.model_type].language_model.replace(".", r"\.")
    return rf".*{inside}\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def image_only(processor: type[Any]) -> type[Any]:
    """Makes a processor class that reads no videos, since reading them needs torchvision.

    Args:
        processor: A processor class of transformers.

    Returns:
        The class itself if it reads none anyway.
    """
    parts = [name for name in processor.get_attributes() if name != "video_processor"]
    if parts == processor.get_attributes():
        return processor
    # The name is written into the checkpoints that the processor is saved to.
    return type(processor.__name__, (processor,), {"get_attributes": classmethod(lambda _: parts)})
