"""A random LLaVA with 30 million parameters and 576 image tokens, for benchmarks on a CPU.

It has the proportions of a real model where they decide about time: the image is most of the
prompt, and the language model costs several times as much as the vision tower.
"""

from __future__ import annotations

from pathlib import Path

import torch

from srccore.config import ModelConfig
from srccore.models.merged import save_in_public_names
from srccore.models.policy import load_processor

__all__ = ["SIDE", "wide_checkpoint"]

SIDE, PATCH = 336, 14
VISION = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
    "projection_dim": 256,
}
TEXT = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}


def wide_checkpoint(folder: Path, vocabulary: int | None = None) -> ModelConfig:
    """Writes the checkpoint, with the tokenizer and the chat template of the embedded model.

    Args:
        folder: The folder to write.
        vocabulary: Rows of the embedding and of the head; by default the tokenizer's.

    Returns:
        The configuration that loads it.
    """
    import transformers

    processor = load_processor(ModelConfig(path="embedded:lvlm"))
    words = processor.tokenizer
    text = transformers.LlamaConfig(
        **TEXT,
        vocab_size=vocabulary or len(words),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    shape = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    save_in_public_names(transformers.LlavaForConditionalGeneration(shape), folder)
    processor.patch_size = PATCH
    processor.image_processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    processor.save_pretrained(folder)
    return ModelConfig(path=str(folder))
