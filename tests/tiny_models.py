"""Tiny random checkpoints of the architectures that the presets use, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from srccore.config import ModelConfig
from srccore.embedded.model import LVLM_TEMPLATE
from srccore.method.engine import Prompt
from srccore.models.merged import save_in_public_names

SIDE, PATCH, WIDTH = 24, 6, 32
TEXT_SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
TOKEN_IDS = {"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
QUESTION = "How high is the red bar?"
RESPONSE = "The red bar is three high.\nAnswer: 3"
OTHER = "The blue bar is four high.\nAnswer: 4"
TEXTS = [
    QUESTION,
    RESPONSE,
    OTHER,
    "USER: ASSISTANT: A chat between a curious user and an artificial intelligence assistant.",
    "You are a helpful language and vision assistant. user assistant system",
    "0 1 2 3 4 5 6 7 8 9 Rating:",
]
SPECIAL = {
    "embedded": ["<unk>", "<s>", "</s>", "<pad>", "<image>"],
    "llava-1.5": ["<unk>", "<s>", "</s>", "<pad>", "<image>"],
    "llava-next": [
        "<unk>",
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<pad>",
        "<image>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ],
}
TEMPLATES = {"embedded": None, "llava-1.5": "llava-1.5", "llava-next": "llava-next-llama3"}


def image(width: int = 30, height: int = 20) -> Image.Image:
    picture = Image.new("RGB", (width, height), "navy")
    picture.paste((200, 30, 10), (0, 0, width // 2, height // 3))
    return picture


def prompt(picture: Image.Image, question: str = QUESTION) -> Prompt:
    return Prompt(lambda: picture, question, key=str(id(picture)))


def tokenizer(kind: str) -> Any:
    """Llama's for LLaVA-1.5 (adds a space before every text, and the BOS), else byte-level."""
    special = SPECIAL[kind]
    return train_tokenizer(
        special,
        llama=kind == "llava-1.5",
        writes_bos=kind != "embedded",
        unk_token="<unk>",
        bos_token=special[1],
        eos_token=special[2],
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def train_tokenizer(special: list[str], *, llama: bool, writes_bos: bool, **tokens: Any) -> Any:
    """Trains a BPE tokenizer on a few texts.

    Args:
        special: The special tokens, in the order of their ids.
        llama: Whether it is Llama's, which adds a space before every text; else byte-level.
        writes_bos: Whether it adds the BOS by itself.
        tokens: What they are for, as ``PreTrainedTokenizerFast`` takes it.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token=tokens.get("unk_token")))
    if llama:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        # No token of Llama's contains a space except at its start.
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
        alphabet = sorted(set("".join(TEXTS)) | {"▁", "\n", "'"})
    else:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(TEXTS, trainer)
    if writes_bos:
        bos = tokens["bos_token"]
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, special.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, clean_up_tokenization_spaces=False, **tokens
    )


def checkpoint(
    kind: str,
    out: Path,
    *,
    text: Any = None,
    pixels: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    eos: list[int] | None = None,
    shards: bool = False,
) -> ModelConfig:
    """Writes a tiny random checkpoint and returns the configuration that loads it.

    Args:
        kind: A key of `TEMPLATES`.
        out: The folder to write.
        text: The configuration of the language model; by default a Llama's.
        pixels: Changes to the settings of the image processor.
        dtype: Of the weights.
        eos: What ``generation_config.json`` names as EOS; by default the tokenizer's.
        shards: Whether the weights are in several files.
    """
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    words = tokenizer(kind)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    shared = {
        "vision_config": vision,
        "text_config": text or llama(vocab_size=len(words)),
        "image_token_id": 4,
        "image_seq_length": (SIDE // PATCH) ** 2,
        "pad_token_id": 3,
        "tie_word_embeddings": False,
    }
    side = {"height": SIDE, "width": SIDE}
    pixels = {"size": {"shortest_edge": SIDE}, "crop_size": side, **(pixels or {})}
    counting = {
        "tokenizer": words,
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": LVLM_TEMPLATE if kind == "embedded" else None,
    }
    if kind == "llava-next":
        grid = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
        model = LlavaNextForConditionalGeneration(
            LlavaNextConfig(**shared, image_grid_pinpoints=grid)
        )
        images = LlavaNextImageProcessorPil(**pixels, image_grid_pinpoints=grid)
        processor = LlavaNextProcessor(image_processor=images, **counting)
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**shared))
        processor = LlavaProcessor(image_processor=CLIPImageProcessorPil(**pixels), **counting)
    model.to(dtype)
    if eos is not None:
        model.generation_config.eos_token_id = eos
    if shards:
        model.save_pretrained(out, max_shard_size="100KB")
    else:
        save_in_public_names(model, out)
    processor.save_pretrained(out)
    return ModelConfig(
        path=str(out), dtype=str(dtype).removeprefix("torch."), chat_template=TEMPLATES[kind]
    )


def llama(**changes: Any) -> Any:
    """The configuration of a tiny Llama; ``vocab_size`` is required."""
    from transformers import LlamaConfig

    return LlamaConfig(**{**TEXT_SHAPE, **TOKEN_IDS, **changes})


def adapter(base: ModelConfig, out: Path, rank: int, seed: int, targets: str = TARGETS) -> Path:
    """Writes a random adapter that changes the base model (B is not zero)."""
    from peft import LoraConfig, get_peft_model

    from srccore.models.policy import Policy, load_policy

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False
    )
    wrapped = get_peft_model(load_policy(Policy(base=base)).model, config)
    wrapped.save_pretrained(out, save_embedding_layers=False)
    return out


def logits(model: Any, processor: Any) -> torch.Tensor:
    from srccore.models.policy import prompt_text

    batch = processor(
        images=[[image()]],
        text=[prompt_text(processor, QUESTION)],
        return_tensors="pt",
        add_special_tokens=False,
    )
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture(scope="session", params=list(TEMPLATES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A tiny random checkpoint of each architecture."""
    return checkpoint(request.param, tmp_path_factory.mktemp(request.param))
