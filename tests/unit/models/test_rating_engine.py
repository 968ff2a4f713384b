"""The rating engine against the model itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from srccore.data.records import Candidate, Category, Sample
from srccore.errors import UserError
from srccore.method import scoring
from srccore.method.engine import Work
from srccore.models.rating import (
    TransformersRatingEngine,
    _fast_products,
    encode_rating_prompts,
    single_token,
)

TOKENS = ["1", "2", "3", "4", "5"]
SAMPLE = Sample(
    id="s", category=Category.CHART, question=tiny_models.QUESTION, answer="3", rationale="It is 3."
)
CANDIDATES = tuple(
    Candidate(id=str(number), text=text, log_probability=-1.0, token_count=9)
    for number, text in enumerate(
        (
            tiny_models.RESPONSE,
            tiny_models.OTHER,
            "The red bar is three high. The blue bar is four high.\nAnswer: 3",
            "The red bar is four high.\nAnswer: 4",
        )
    )
)
PROMPTS = [
    *(
        scoring.rating_prompt(SAMPLE, first.text, second.text)
        for first, second in scoring.pair_schedule(SAMPLE, CANDIDATES)
    ),
    "Rating:",
    tiny_models.OTHER,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scorer that was saved in bfloat16."""
    made = tmp_path_factory.mktemp("scorer")
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
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def test_ratings_equal_those_of_each_whole_prompt_in_float32(folder: Path) -> None:
    engine = TransformersRatingEngine.load(folder, "cpu", batch_tokens=8192)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [single_token(tokenizer, token) for token in TOKENS]
    encoded = encode_rating_prompts(tokenizer, PROMPTS)

    found = engine.next_token_distribution(PROMPTS, TOKENS)

    for prompt, each in zip(encoded, found, strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)[ids]
        assert each.probabilities == pytest.approx((wanted / wanted.sum()).tolist(), abs=1e-5)
        assert each.mass == pytest.approx(float(wanted.sum()), abs=1e-5)


def test_ratings_do_not_depend_on_what_is_rated_together(folder: Path) -> None:
    together = TransformersRatingEngine.load(folder, "cpu", batch_tokens=8192)
    divided = TransformersRatingEngine.load(folder, "cpu", batch_tokens=150)
    wanted = together.next_token_distribution(PROMPTS, TOKENS)
    alone = [together.next_token_distribution([prompt], TOKENS)[0] for prompt in PROMPTS]
    others = divided.next_token_distribution(PROMPTS[::-1], TOKENS)[::-1]
    for each in (alone, others):
        for one, other in zip(each, wanted, strict=True):
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_nothing_is_read_for_no_prompts(folder: Path) -> None:
    assert TransformersRatingEngine.load(folder, "cpu", 8).next_token_distribution([], TOKENS) == []


def test_prompts_are_encoded_together_as_they_are_alone(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert encode_rating_prompts(tokenizer, PROMPTS) == [
        encode_rating_prompts(tokenizer, [prompt])[0] for prompt in PROMPTS
    ]


def test_a_rating_that_is_several_tokens_is_refused(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UserError, match="encodes '12' as 2 tokens"):
        single_token(tokenizer, "12")


def test_the_engine_counts_what_goes_through_the_model(folder: Path) -> None:
    engine = TransformersRatingEngine.load(folder, "cpu", batch_tokens=8192)
    encoded = encode_rating_prompts(AutoTokenizer.from_pretrained(folder), PROMPTS)
    prefixes = {tuple(ids[:end]) for ids in encoded for end in range(1, len(ids) + 1)}
    engine.next_token_distribution(PROMPTS, TOKENS)
    assert engine.work == Work(
        prompts=len(PROMPTS), prefilled_tokens=len(prefixes), forward_passes=1
    )


def test_fast_products_on_a_gpu_are_switched_off_again() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), _fast_products("cuda"):
        assert torch.get_float32_matmul_precision() == "high"
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == before
    with _fast_products("cpu"):
        assert torch.get_float32_matmul_precision() == before
