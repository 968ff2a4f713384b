"""Random checkpoints of under a million parameters, with the quirks of public ones.

`CHECKPOINTS` lists them by name with what is awkward about each. The fixture `awkward` (in
``tests/conftest.py``) builds one by its name, once per session and in under a second:
``awkward("qwen2.5-vl")`` returns the configuration that loads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
from PIL.Image import Image

from srccore.config import ModelConfig
from srccore.models.families import image_only

SIDE, PATCH, WIDTH = tiny_models.SIDE, tiny_models.PATCH, tiny_models.WIDTH
PADDING = 48
"""Rows of a padded embedding past the tokenizer, as in public checkpoints of Llama and Qwen."""
SHAPES = [(30, 20), (20, 60), (24, 24), (70, 20)]
"""Widths and heights of images that are tiled or scaled in four ways."""

QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Of Qwen2.5-VL, without videos and numbered images."""
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""Of SmolVLM: the prompt ends without a space, which the response then begins with."""
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One awkward checkpoint.

    Attributes:
        quirk: What is awkward about it.
        build: Writes it into a folder and returns the configuration that loads it.
    """

    quirk: str
    build: Callable[[Path], ModelConfig]


def images() -> list[Image]:
    """One image of each of `SHAPES`."""
    return [tiny_models.image(*shape) for shape in SHAPES]


def _llava(
    kind: str, *, padding: int = 0, heads: int = 1, **changes: Any
) -> Callable[[Path], ModelConfig]:
    """A LLaVA of `tiny_models` whose two query heads read ``heads`` heads of keys and values."""

    def build(out: Path) -> ModelConfig:
        rows = len(tiny_models.tokenizer(kind)) + padding
        text = tiny_models.llama(vocab_size=rows, num_key_value_heads=heads)
        return tiny_models.checkpoint(kind, out, text=text, **changes)

    return build


def _sliding(out: Path) -> ModelConfig:
    from transformers import MistralConfig

    text = MistralConfig(
        **tiny_models.TEXT_SHAPE,
        **tiny_models.TOKEN_IDS,
        head_dim=WIDTH // 2,
        vocab_size=len(tiny_models.tokenizer("llava-1.5")),
        sliding_window=16,
    )
    return tiny_models.checkpoint("llava-1.5", out, text=text)


def _saved(model: Any, processor: Any, out: Path) -> ModelConfig:
    model.save_pretrained(out)
    processor.save_pretrained(out)
    # As in public checkpoints, which a processor for videos is loaded from too.
    processor.image_processor.save_pretrained(out)
    return ModelConfig(path=str(out))


def _qwen(out: Path) -> ModelConfig:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessorPil,
    )

    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    tokenizer = tiny_models.train_tokenizer(
        special,
        llama=False,
        writes_bos=False,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                **tiny_models.TEXT_SHAPE,
                "vocab_size": len(tokenizer) + PADDING,
                "bos_token_id": 0,
                "eos_token_id": 2,
                "pad_token_id": 0,
                # Halves of a head's values, for time, height and width.
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [WIDTH // 16, WIDTH * 3 // 32, WIDTH * 3 // 32],
                },
            },
            vision_config={
                "depth": 2,
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
                "num_heads": 2,
                "patch_size": PATCH,
                "window_size": 4 * PATCH,
                "out_hidden_size": WIDTH,
                "fullatt_block_indexes": [1],
            },
            vision_start_token_id=3,
            vision_end_token_id=4,
            image_token_id=5,
            video_token_id=6,
        )
    )
    # The public checkpoint's too: the end of a turn, and the end of a text.
    model.generation_config.eos_token_id = [2, 0]
    model.generation_config.pad_token_id = 0
    pixels = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        size={"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 8 * (2 * PATCH) ** 2},
    )
    processor = image_only(Qwen2_5_VLProcessor)(
        image_processor=pixels,
        tokenizer=tokenizer,
        chat_template=QWEN_TEMPLATE,
    )
    return _saved(model, processor, out)


def _smolvlm(out: Path) -> ModelConfig:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
    )

    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<image>",
        "<fake_token_around_image>",
        "<end_of_utterance>",
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    ]
    tokenizer = tiny_models.train_tokenizer(
        special,
        llama=False,
        writes_bos=False,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
    )
    torch.manual_seed(0)
    text = tiny_models.llama(
        vocab_size=len(tokenizer) + PADDING, bos_token_id=1, eos_token_id=5, pad_token_id=2
    )
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            text_config=text.to_dict(),
            vision_config={
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": SIDE,
                "patch_size": PATCH,
            },
            image_token_id=3,
            pad_token_id=2,
            scale_factor=2,
        )
    )
    model.generation_config.eos_token_id = 5
    model.generation_config.pad_token_id = 2
    pixels = Idefics3ImageProcessorPil(
        size={"longest_edge": 3 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    processor = Idefics3Processor(
        image_processor=pixels,
        tokenizer=tokenizer,
        image_seq_len=(SIDE // PATCH) ** 2 // 4,
        chat_template=SMOLVLM_TEMPLATE,
    )
    return _saved(model, processor, out)


def _internvl(out: Path) -> ModelConfig:
    from transformers import (
        GotOcr2ImageProcessorPil,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
    )

    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<img>",
        "</img>",
        "<IMG_CONTEXT>",
        "<video>",
    ]
    tokenizer = tiny_models.train_tokenizer(
        special,
        llama=False,
        writes_bos=False,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    torch.manual_seed(0)
    seen = (SIDE // PATCH) ** 2 // 4
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            text_config={
                **tiny_models.TEXT_SHAPE,
                "model_type": "qwen2",
                "vocab_size": len(tokenizer) + PADDING,
                "bos_token_id": 0,
                "eos_token_id": 2,
                "pad_token_id": 0,
            },
            vision_config={
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": [SIDE, SIDE],
                "patch_size": [PATCH, PATCH],
            },
            image_token_id=5,
            image_seq_length=seen,
            tie_word_embeddings=False,
        )
    )
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    pixels = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=4
    )
    processor = image_only(InternVLProcessor)(
        image_processor=pixels,
        tokenizer=tokenizer,
        image_seq_length=seen,
        chat_template=INTERNVL_TEMPLATE,
    )
    return _saved(model, processor, out)


CHECKPOINTS = {
    "padded-vocabulary": Checkpoint(
        "the embedding has more rows than the tokenizer has tokens; no GQA; Llama's tokenizer",
        _llava("llava-1.5", padding=PADDING, heads=2),
    ),
    "other-eos": Checkpoint(
        "generation_config names another EOS than the chat template writes; byte-level tokenizer",
        _llava("llava-next", padding=PADDING, eos=[5]),
    ),
    "cropping": Checkpoint(
        "the processor scales the shorter side and cuts the rest off",
        _llava("llava-1.5", pixels={"size": {"shortest_edge": SIDE + 4}}),
    ),
    "padded-to-square": Checkpoint(
        "images are padded to squares before they are scaled",
        lambda out: _llava("llava-1.5")(out).model_copy(update={"pad_to_square": True}),
    ),
    "llava-next-shapes": Checkpoint(
        "images are tiled by their shape; two heads share the keys and values",
        _llava("llava-next"),
    ),
    "bfloat16": Checkpoint("weights in bfloat16", _llava("llava-1.5", dtype=torch.bfloat16)),
    "float16-shards": Checkpoint(
        "weights in float16, in several files",
        _llava("llava-next", dtype=torch.float16, shards=True),
    ),
    "sliding-window": Checkpoint("attention sees the last 16 tokens only", _sliding),
    "qwen2.5-vl": Checkpoint("M-RoPE, images of any size, two EOS, padded vocabulary", _qwen),
    "smolvlm": Checkpoint("Idefics3: images in tiles with marks between them", _smolvlm),
    "internvl": Checkpoint(
        "images in tiles; the placeholder is not the image's only token", _internvl
    ),
}
"""All of them, by name."""
