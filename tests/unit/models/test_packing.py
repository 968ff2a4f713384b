"""Packed rows against forward passes over each sequence alone."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from srccore.errors import UserError
from srccore.models import packing
from srccore.models.packing import batches, next_logits, pack, use_packing

VOCABULARY = 24
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
WINDOW = 5
SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=8)


def qwen2(**changes: Any) -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, **changes))


MODELS = {
    "qwen2": qwen2,
    "qwen2 with a window in some layers": lambda: qwen2(
        use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "mistral, with a window in all layers": lambda: MistralForCausalLM(
        MistralConfig(**SHAPE, sliding_window=WINDOW)
    ),
    "llama, every head with keys of its own": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE | {"num_key_value_heads": 4})
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
}


@functools.cache
def twice(kind: str) -> tuple[Any, Any]:
    """The same model as it is and packed."""
    torch.manual_seed(0)
    plain, packed = MODELS[kind]().eval(), MODELS[kind]().eval()
    packed.load_state_dict(plain.state_dict())
    use_packing(packed)
    return plain, packed


@pytest.fixture(params=list(MODELS))
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return twice(request.param)


def alone(model: Any, sequence: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([sequence])).logits[0, -1]
    return logits


def assert_equal(models: tuple[Any, Any], sequences: list[list[int]]) -> None:
    plain, packed = models
    with torch.no_grad():
        wanted = torch.stack([alone(plain, sequence) for sequence in sequences])
        found = next_logits(packed, pack(sequences))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


def test_each_sequence_has_the_logits_that_it_has_alone(models: tuple[Any, Any]) -> None:
    # Prefixes that are shared by all, by some and by none; one sequence within another; one twice;
    # sequences longer than the window.
    head = [5, 6, 7, 8, 9, 10, 11]
    sequences = [
        [*head, 1, 2, *second] for second in ([3], [3, 4, 5, 6], [4, 4, 4], [3, 4, 5, 6, 7, 8, 9])
    ]
    sequences += [[*head, 2, 1, 3], head, [12], [*head, 2, 1, 3], list(range(VOCABULARY)) * 3]
    assert_equal(models, sequences)


def test_blocks_of_attention_may_be_divided(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "GATHERED", 20)
    sequences = [[1, 2, 3, *tail] for tail in itertools.permutations([4, 5, 6, 7])]
    assert len(pack(sequences)["packed"].blocks) > 4
    assert_equal(models, sequences)


@given(SEQUENCES)
def test_any_sequences_can_be_packed(sequences: list[list[int]]) -> None:
    assert_equal(twice("qwen2"), sequences)


def test_gradients_are_those_of_the_sequences_alone(models: tuple[Any, Any]) -> None:
    plain, packed = models
    sequences = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [7, 8], [1, 2]]
    labels = torch.tensor([9, 10, 11, 12])
    cross_entropy(torch.stack([alone(plain, each) for each in sequences]), labels).backward()
    cross_entropy(next_logits(packed, pack(sequences)), labels).backward()
    for (name, one), other in zip(plain.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-5, rtol=1e-4, msg=name)
    plain.zero_grad()
    packed.zero_grad()


@given(SEQUENCES, st.integers(1, 30))
def test_batches_have_every_sequence_once_and_keep_to_their_tokens(
    sequences: list[list[int]], tokens: int
) -> None:
    found = list(batches(sequences, tokens))
    assert sorted(itertools.chain(*found)) == list(range(len(sequences)))
    for batch in found:
        row = pack([sequences[number] for number in batch])
        assert row["input_ids"].shape[1] <= tokens or len(batch) == 1


@given(SEQUENCES)
def test_a_row_has_each_prefix_once(sequences: list[list[int]]) -> None:
    prefixes = {tuple(each[:end]) for each in sequences for end in range(1, len(each) + 1)}
    row = pack(sequences)
    assert row["input_ids"].shape == (1, len(prefixes))
    # Each sequence ends at its own last token, at the position of that token.
    ends = row["logits_to_keep"]
    assert row["input_ids"][0, ends].tolist() == [each[-1] for each in sequences]
    assert row["position_ids"][0, ends].tolist() == [len(each) - 1 for each in sequences]


def test_pairs_of_one_sample_need_a_third_of_the_tokens() -> None:
    # A head of 150 tokens and 5 responses of 60: 20 ordered pairs of 270 tokens, or the head, 5
    # first responses and 20 second ones: 150 + 300 + 1200.
    head = list(range(150))
    said = [[1000 * number + place for place in range(60)] for number in range(1, 6)]
    pairs = [head + one + other for one, other in itertools.permutations(said, 2)]
    assert sum(map(len, pairs)) == 5400
    assert pack(pairs)["input_ids"].shape[1] == 1650


def test_nothing_is_divided_into_no_batches() -> None:
    assert list(batches([], 10)) == []


REFUSED = {
    "scores with a cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8)),
    "distances from a mask": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2)
    ),
    "a state instead of attention": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4)
    ),
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_a_model_that_cannot_be_packed_is_refused(kind: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match="cannot be R-Scorer"):
        use_packing(REFUSED[kind]())
