"""The rating engine against the model itself."""

from __future__ import annotations

from pathlib import Path

import tiny_models
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from srccore.models.transformers import TransformersRatingEngine, encode_rating_prompt, single_token

TOKENS = ["1", "2", "3", "4", "5"]
PROMPTS = ["Rating:", tiny_models.QUESTION + " Rating:", tiny_models.OTHER]


def test_a_scorer_saved_in_bfloat16_is_read_in_float32(tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer("llava-next")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = [single_token(tokenizer, token) for token in TOKENS]

    engine = TransformersRatingEngine.load(tmp_path, "cpu", batch_size=2)

    for prompt, found in zip(PROMPTS, engine.next_token_distribution(PROMPTS, TOKENS), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([encode_rating_prompt(tokenizer, prompt)])).logits[0, -1]
        wanted = logits.double().softmax(-1)[ids]
        torch.testing.assert_close(
            torch.tensor(found.probabilities, dtype=torch.double),
            wanted / wanted.sum(),
            atol=1e-5,
            rtol=0,
        )
        assert abs(found.mass - float(wanted.sum())) < 1e-5
