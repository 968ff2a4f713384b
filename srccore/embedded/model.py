"""The shape of the embedded models: a plain LLaVA checkpoint and a plain Qwen2 one.

No custom model class, so the same folders load in transformers, TRL and vLLM.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from srccore.embedded import flaws
from srccore.embedded.world import IMAGE_SIZE, make_item

__all__ = [
    "LVLM_TEMPLATE",
    "MODELS",
    "RATING_TEMPLATE",
    "build_processor",
    "build_rating_model",
    "build_tokenizer",
    "build_vision_language_model",
]

MODELS = Path(__file__).parent / "models"
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
UNK, BOS, EOS, PAD, IMAGE = range(5)
VOCABULARY = 768
PATCH = 12
WIDTH = 128
LAYERS = 4
MEAN, STD = [0.5, 0.5, 0.5], [0.3, 0.3, 0.3]
LAYER_SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 3 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
TOKEN_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
LANGUAGE_SHAPE = {
    **LAYER_SHAPE,
    **TOKEN_IDS,
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
"""Of both language models."""

# Both templates write BOS and EOS, so that the model learns to end a response, and training and
# inference see the same token ids.
LVLM_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %} ASSISTANT:"
    "{% else %} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}</s>{% endif %}{% endfor %}"
)
RATING_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] }}\nRating:"
    "{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
)


def build_tokenizer(seed: int) -> Any:
    """Trains the byte-level BPE tokenizer on texts of the pretraining split.

    Args:
        seed: The data set's seed.

    Returns:
        A ``PreTrainedTokenizerFast``; every digit is a token of its own.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)
    texts = []
    for number in range(6000):
        item = make_item(seed, "pretrain", number)
        texts.append(f"USER: \n{item.sample.question} ASSISTANT: {item.sample.answer}")
        texts.append(flaws.flawed_response(item, rng))
        texts += [" ".join(turn) for turn in flaws.perception_turns(item, rng)]
    texts += ["\nQuestion: \nReference: \nFacts: \nFirst: \nSecond: \nRating:"] * 100
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_processor(tokenizer: Any) -> Any:
    """Builds the LLaVA processor: images to 72 x 72 pixels, ``<image>`` to 36 tokens."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=MEAN, image_std=STD
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LVLM_TEMPLATE,
    )


def build_vision_language_model() -> Any:
    """Builds the untrained LLaVA: CLIP tower 4 x 128, Llama 4 x 128, about 2 M parameters."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        **LAYER_SHAPE, image_size=IMAGE_SIZE, patch_size=PATCH, projection_dim=WIDTH
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**LANGUAGE_SHAPE),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        tie_word_embeddings=False,
        **TOKEN_IDS,
    )
    return LlavaForConditionalGeneration(config)


def build_rating_model() -> Any:
    """Builds the untrained text model of R-Scorer: Qwen2 4 x 128, about 1.2 M parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**LANGUAGE_SHAPE, tie_word_embeddings=True))
