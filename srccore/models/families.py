"""The families of vision-language models that a policy may be of, and what differs between them.

A family is the ``model_type`` of a checkpoint's ``config.json``. Every stage is tested on a tiny
checkpoint of each (``tests/awkward``). Others are refused by name: their checkpoints may load, but
nobody has checked that training and search agree on their image tokens, positions and turns.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srccore.errors import UserError
from srccore.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FAMILIES",
    "Family",
    "family_of",
    "image_only",
    "image_tokens",
    "in_language_model",
    "language_model_targets",
    "load_processor_of",
    "prompt_positions",
    "save_processor",
]


@dataclass(frozen=True)
class Family:
    """What the package must know about a family beyond what its model and processor say.

    Attributes:
        example: A public checkpoint.
        language_model: The name of the language model inside the model.
    """

    example: str
    language_model: str = "model.language_model"


FAMILIES: Mapping[str, Family] = {
    "llava": Family("llava-hf/llava-1.5-7b-hf"),
    "llava_next": Family("llava-hf/llama3-llava-next-8b-hf"),
    "qwen2_5_vl": Family("Qwen/Qwen2.5-VL-7B-Instruct"),
    "idefics3": Family("HuggingFaceTB/SmolVLM-500M-Instruct", language_model="model.text_model"),
    "internvl": Family("OpenGVLab/InternVL3-1B-hf"),
}
"""By ``model_type``."""


def family_of(path: str, revision: str | None = None) -> str:
    """Returns the ``model_type`` of a checkpoint, which is one of `FAMILIES`.

    Args:
        path: A folder or a hub id.
        revision: Of the hub.

    Raises:
        UserError: The family is not one of `FAMILIES`.
        OSError: There is no such checkpoint.
    """
    config = Path(path) / "config.json"
    if not config.is_file():
        from huggingface_hub import hf_hub_download

        config = Path(hf_hub_download(path, "config.json", revision=revision))
    name = json.loads(config.read_text(encoding="utf-8")).get("model_type", "")
    if name in FAMILIES:
        return str(name)
    tested = ", ".join(f"{known} ({family.example})" for known, family in FAMILIES.items())
    raise UserError(
        f"The checkpoint {path} is of the family {name!r}, which is not supported: the name "
        "of its language model is not known, and no stage has been tested on it.",
        f"Use a checkpoint of one of these families: {tested}.",
    )


def load_processor_of(family: str, path: str, revision: str | None) -> Any:
    """Loads the processor of a checkpoint, without its part for videos, which needs torchvision.

    Images are processed with PIL, also where torchvision is installed: vLLM needs it, training does
    not, and its pixels differ.

    Args:
        family: Its ``model_type``.
        path: A folder or a hub id.
        revision: Of the hub.

    Returns:
        The processor.
    """
    from transformers import AutoImageProcessor

    processor = image_only(_processor_class(family)).from_pretrained(
        path, revision=revision, trust_remote_code=False
    )
    processor.image_processor = AutoImageProcessor.from_pretrained(
        path, revision=revision, backend="pil", trust_remote_code=False
    )
    return processor


def image_only(processor: type[Any]) -> type[Any]:
    """Makes a processor class without a part for videos.

    Args:
        processor: A processor class of transformers.

    Returns:
        A subclass of the same name, or the class itself if it reads no videos anyway.
    """
    parts = [name for name in processor.get_attributes() if name != "video_processor"]
    if parts == processor.get_attributes():
        return processor
    # The name is written into the checkpoints that the processor is saved to.
    return type(processor.__name__, (processor,), {"get_attributes": classmethod(lambda _: parts)})


def save_processor(
    processor: Any, out: Path, family: str, source: str, revision: str | None
) -> None:
    """Writes a processor into a checkpoint, with the settings that its source has for videos.

    The package reads no videos, but vLLM and others load no checkpoint of some families without.

    Args:
        processor: A processor of `load_processor_of`.
        out: The folder to write.
        family: Its ``model_type``.
        source: The folder or hub id that it was loaded from.
        revision: Of the hub.
    """
    from transformers.video_processing_utils import BaseVideoProcessor

    processor.save_pretrained(out)
    if "video_processor" in _processor_class(family).get_attributes():
        videos, _ = BaseVideoProcessor.get_video_processor_dict(source, revision=revision)
        write_json(out / "video_preprocessor_config.json", videos)


def _processor_class(family: str) -> Any:
    from transformers import CONFIG_MAPPING, PROCESSOR_MAPPING

    return PROCESSOR_MAPPING[CONFIG_MAPPING[family]]


def image_tokens(processor: Any, size: tuple[int, int]) -> int:
    """Counts the tokens that an image takes in a prompt, with the marks around and inside it.

    Args:
        processor: The policy's processor.
        size: Width and height of the image.
    """
    width, height = size
    counted = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
    return int(counted.num_image_tokens[0])


def language_model_targets(model: Any, pattern: str | None = None) -> str:
    """Returns the pattern of the linear layers that LoRA trains: those of the language model.

    Names like ``q_proj`` alone would also match the vision tower, which vLLM cannot adapt.

    Args:
        model: A model of one of `FAMILIES`, not wrapped by PEFT.
        pattern: A pattern of your own, which is returned if it fits.

    Raises:
        UserError: The pattern matches modules outside the language model.
    """
    if pattern is None:
        inside = FAMILIES[model.config.model_type].language_model.replace(".", r"\.")
        return rf"{inside}\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    # As PEFT matches it.
    found = (name for name, _ in model.named_modules() if re.fullmatch(pattern, name))
    if outside := [name for name in found if not in_language_model(model, name)]:
        raise UserError(
            f"lora.target_modules {pattern!r} matches {outside[0]}, which is outside the language "
            "model.",
            f"Let it start with {FAMILIES[model.config.model_type].language_model}, or leave it "
            "out.",
        )
    return pattern


def in_language_model(model: Any, name: str) -> bool:
    """Whether a module is inside the language model.

    Args:
        model: A model of one of `FAMILIES`, not wrapped by PEFT.
        name: The module's name.
    """
    return name.startswith(f"{FAMILIES[model.config.model_type].language_model}.")


def prompt_positions(
    backbone: Any, tokens: Tensor, is_prompt: Tensor, inputs: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Computes the positions of prompts as the model itself does; those of M-RoPE follow the image.

    Args:
        backbone: A model of one of `FAMILIES`, without its head.
        tokens: (rows, length), ids.
        is_prompt: (rows, length), true for the tokens of a row's prompt, one after the other.
        inputs: What the processor returned besides.

    Returns:
        (rows, length), or (3, rows, length) for M-RoPE, of which only those of the prompts mean
        anything; and (rows,), the position that follows each prompt.
    """
    mask = is_prompt.long()
    of_images = getattr(backbone, "get_rope_index", None)
    if of_images is None:
        return (mask.cumsum(-1) - 1).clamp(min=0), mask.sum(-1)
    accepted = inspect.signature(of_images).parameters
    given = {name: value for name, value in inputs.items() if name in accepted}
    positions, shift = of_images(**{**given, "input_ids": tokens, "attention_mask": mask})
    return positions, mask.sum(-1) + shift[:, 0]
