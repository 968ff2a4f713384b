"""The sampling engine against the model itself, on every awkward checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import tiny_models
import torch
from awkward.checkpoints import CHECKPOINTS, images
from torch import Tensor

from srccore.config import ModelConfig
from srccore.errors import UserError
from srccore.method.driver import draw_all
from srccore.method.engine import Continuation, Draw, Prompt
from srccore.models import transformers
from srccore.models.policy import LoadedPolicy, Policy, load_policy, response_text
from srccore.models.transformers import (
    TransformersSamplingEngine,
    encode_prompts,
)
from srccore.models.writing import banned_tokens, end_tokens

Awkward = Callable[[str], ModelConfig]
QUESTIONS = [tiny_models.QUESTION, "Why?", "Is it red or blue? " + tiny_models.OTHER, "How?"]
PROMPTS = [tiny_models.prompt(image, text) for image, text in zip(images(), QUESTIONS, strict=True)]


def load(awkward: Awkward, name: str, dtype: str = "float32") -> LoadedPolicy:
    """Loads a checkpoint, by default in float32: the engine is exact, half precision is not."""
    return load_policy(Policy(base=awkward(name).model_copy(update={"dtype": dtype})))


def engine(policy: LoadedPolicy) -> TransformersSamplingEngine:
    return TransformersSamplingEngine(policy.model, policy.processor)


def opened(sampler: TransformersSamplingEngine, prompts: Sequence[Prompt]) -> list[Any]:
    return sampler.open(sampler.prepare(prompts))


@contextlib.contextmanager
def favouring(model: Any, ids: Sequence[int], amount: float, after: int = 0) -> Iterator[None]:
    """Makes tokens likelier, in the rows of a batch from a number on."""

    def add(module: Any, inputs: Any, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[after:, :, list(ids)] += amount
        return logits

    hook = model.get_output_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def likely_line_breaks(policy: LoadedPolicy) -> contextlib.AbstractContextManager[None]:
    """So that rows stop at different places, and later ones start from a cache with gaps."""
    vocabulary = policy.processor.tokenizer.get_vocab()
    breaks = [number for token, number in vocabulary.items() if token in ("Ċ", "\n")]
    return favouring(policy.model, breaks, 3.0)


def fresh_log_probability(policy: LoadedPolicy, prompt: Prompt, tokens: Sequence[int]) -> float:
    """Reads the whole sequence in one pass: no cache, no padding, the model's own positions."""
    inputs = encode_prompts(policy.processor, [prompt])
    response = torch.tensor([list(tokens)])
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], response], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        text = torch.zeros_like(response)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], text], dim=1)
    floats = {n: v.to(policy.model.dtype) for n, v in inputs.items() if v.is_floating_point()}
    with torch.no_grad():
        logits = policy.model(**{**inputs, **floats}, use_cache=False).logits
    scores = logits[0, length - 1 : -1].float().log_softmax(-1)
    return float(scores.gather(1, response[0][:, None]).sum())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_decoding_equals_generate_token_for_token(awkward: Awkward, name: str) -> None:
    policy = load(awkward, name)
    sampler = engine(policy)
    inputs = encode_prompts(policy.processor, PROMPTS)
    generated = policy.model.generate(
        **inputs,
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=sorted(end_tokens(policy.model, policy.processor)),
        suppress_tokens=banned_tokens(policy.model, policy.processor),
    )[:, inputs["input_ids"].shape[1] :]
    draws = [Draw(node, 24, greedy=True, whole=True) for node in opened(sampler, PROMPTS)]
    for drawn, wanted in zip(draw_all(sampler, draws), generated.tolist(), strict=True):
        if drawn.stop == "end":
            assert wanted[drawn.token_count - 1] in end_tokens(policy.model, policy.processor)
            text = wanted[: drawn.token_count]
            assert drawn.text == policy.processor.decode(text, skip_special_tokens=True)
        else:
            assert list(drawn.node.tokens) == wanted


def drawn_in_two_steps(
    sampler: TransformersSamplingEngine, prompts: Sequence[Prompt], seeds: Sequence[int]
) -> list[tuple[Continuation, Continuation | None]]:
    """A response per seed to each prompt, continued once where it has not ended."""
    draws = [Draw(node, 10, seed) for node in opened(sampler, prompts) for seed in seeds]
    found: list[tuple[Continuation, Continuation | None]] = [
        (drawn, None) for drawn in draw_all(sampler, draws)
    ]
    alive = [number for number, (drawn, _) in enumerate(found) if drawn.stop != "end"]
    again = [Draw(found[number][0].node, 10, draws[number].seed + 100) for number in alive]
    for number, drawn in zip(alive, draw_all(sampler, again), strict=True):
        found[number] = (found[number][0], drawn)
    return found


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        *((name, "float32", 1e-4) for name in CHECKPOINTS),
        # Of a sum over up to 20 tokens, each rounded to 8 or 11 bits in every layer.
        ("bfloat16", "bfloat16", 0.2),
        ("float16-shards", "float16", 0.02),
    ],
)
def test_log_probabilities_equal_those_of_a_fresh_forward_pass(
    awkward: Awkward, name: str, dtype: str, tolerance: float
) -> None:
    policy = load(awkward, name, dtype)
    sampler, stops = engine(policy), set()
    with likely_line_breaks(policy):
        for number, (first, second) in enumerate(drawn_in_two_steps(sampler, PROMPTS, range(4))):
            prompt, score = PROMPTS[number // 4], first.log_probability
            stops.add(first.stop)
            if first.stop != "end":
                wanted = fresh_log_probability(policy, prompt, first.node.tokens)
                assert score == pytest.approx(wanted, abs=tolerance)
            if second is not None and second.stop != "end":
                wanted = fresh_log_probability(policy, prompt, second.node.tokens)
                assert score + second.log_probability == pytest.approx(wanted, abs=tolerance)
    assert {"sentence", "length"} <= stops


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_batch_of_unlike_prompts_gives_what_each_gives_alone(awkward: Awkward, name: str) -> None:
    policy = load(awkward, name)
    sampler = engine(policy)
    with likely_line_breaks(policy):
        together = drawn_in_two_steps(sampler, PROMPTS, range(2))
        alone = [
            pair
            for prompt in PROMPTS
            for seed in range(2)
            for pair in drawn_in_two_steps(sampler, [prompt], [seed])
        ]
    for pair, wanted in zip(together, alone, strict=True):
        for drawn, each in zip(pair, wanted, strict=True):
            assert (drawn is None) == (each is None)
            if drawn is not None and each is not None:
                assert (drawn.text, drawn.stop) == (each.text, each.stop)
                assert drawn.log_probability == pytest.approx(each.log_probability, abs=1e-4)


@pytest.mark.parametrize("name", ["padded-vocabulary", "qwen2.5-vl", "smolvlm", "internvl"])
def test_only_text_is_ever_drawn(awkward: Awkward, name: str) -> None:
    policy = load(awkward, name)
    tokenizer, size = policy.processor.tokenizer, policy.model.get_output_embeddings().out_features
    image = policy.model.config.image_token_id
    ends = end_tokens(policy.model, policy.processor)
    # In Qwen2.5-VL the padding token also ends a text.
    unwanted = [*range(len(tokenizer), size), image, *({tokenizer.pad_token_id} - ends)]
    sampler = engine(policy)
    with favouring(policy.model, unwanted, 50.0):
        roots = opened(sampler, PROMPTS)
        found = draw_all(
            sampler,
            [
                *(Draw(node, 12, seed=7, whole=True) for node in roots),
                *(Draw(node, 12, greedy=True, whole=True) for node in roots),
            ],
        )
    written = {token for drawn in found if drawn.node for token in drawn.node.tokens}
    assert written
    assert not written & set(tokenizer.all_special_ids)
    assert not written & set(unwanted)


@pytest.mark.parametrize("named_by", ["generation_config", "tokenizer", "template"])
def test_a_response_ends_at_the_end_that_any_of_three_names(
    awkward: Awkward, named_by: str
) -> None:
    policy = load(awkward, "other-eos")
    tokenizer = policy.processor.tokenizer
    # All three differ: the template writes 2, generation_config names 5, the tokenizer 1.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(1)
    end = {
        "generation_config": policy.model.generation_config.eos_token_id[0],
        "tokenizer": tokenizer.eos_token_id,
        "template": tokenizer.encode(response_text(policy.processor, "Yes."))[-1],
    }[named_by]
    assert sorted(end_tokens(policy.model, policy.processor)) == [1, 2, 5]
    with favouring(policy.model, [end], 50.0):
        sampler = engine(policy)
        (drawn,) = draw_all(sampler, [Draw(opened(sampler, PROMPTS[:1])[0], 5)])
    assert (drawn.text, drawn.stop, drawn.token_count) == ("", "end", 1)


def test_the_cache_of_a_prompt_is_in_memory_once(awkward: Awkward) -> None:
    policy = load(awkward, "padded-vocabulary")
    sampler = engine(policy)
    roots = opened(sampler, PROMPTS[:2])
    draws = [Draw(node, 6, seed) for node in roots for seed in range(6)]
    first = [drawn for drawn in draw_all(sampler, draws) if drawn.node]
    second = draw_all(sampler, [Draw(drawn.node, 6) for drawn in first])
    nodes = [drawn.node for drawn in (*first, *second) if drawn.node]
    assert {id(node.batch.prompts) for node in nodes} == {id(roots[0].batch.prompts)}
    for node in nodes:
        for states in (state for layer in node.batch.layers for state in layer):
            assert states.shape[2] <= len(node.tokens) + 12


def test_each_image_is_encoded_once_and_each_prompt_prefilled_once(awkward: Awkward) -> None:
    policy = load(awkward, "padded-vocabulary")
    sampler, encoded = engine(policy), []
    policy.model.base_model.vision_tower.register_forward_hook(
        lambda module, inputs, output: encoded.append(len(output[0]))
    )
    with likely_line_breaks(policy):
        found = drawn_in_two_steps(sampler, PROMPTS, range(4))
    drawn = [each for pair in found for each in pair if each is not None]
    lengths = [encode_prompts(policy.processor, [p])["input_ids"].numel() for p in PROMPTS]
    assert sampler.work.image_encodings == sum(encoded) == len(PROMPTS)
    assert sampler.work.prompts == len(PROMPTS)
    assert sampler.work.prefilled_tokens == sum(lengths)
    assert sampler.work.decoded_tokens == sum(each.token_count for each in drawn)
    # Each call decodes all rows together: its longest row takes one pass per token but the last.
    assert 1 + 2 * 9 <= sampler.work.forward_passes <= 1 + 2 * 10


def test_rows_that_have_stopped_leave_the_batch_and_change_nothing(
    awkward: Awkward, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load(awkward, "padded-vocabulary")
    sampler = engine(policy)
    rows: list[int] = []
    policy.model.register_forward_pre_hook(
        lambda module, inputs, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )
    found, steps = {}, {}
    with likely_line_breaks(policy):
        for share in (0.25, 2.0):
            monkeypatch.setattr(transformers, "_WORTH_DROPPING", share)
            rows.clear()
            roots = opened(sampler, PROMPTS)
            draws = [Draw(node, 30, seed) for node in roots for seed in range(6)]
            drawn = draw_all(sampler, draws)
            steps[share] = rows[1:]  # after encoding the prompts
            found[share] = drawn + draw_all(
                sampler, [Draw(each.node, 10, seed=1) for each in drawn if each.node]
            )
    assert set(steps[2.0]) == {24}
    assert len(steps[0.25]) == len(steps[2.0])
    assert steps[0.25][0] == 24
    assert steps[0.25][-1] < 12
    for dropping, keeping in zip(found[0.25], found[2.0], strict=True):
        assert (dropping.text, dropping.stop) == (keeping.text, keeping.stop)
        assert dropping.log_probability == pytest.approx(keeping.log_probability, abs=1e-4)


def test_memory_that_holds_no_token_is_never_read(
    awkward: Awkward, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_empty = torch.Tensor.new_empty

    def poisoned(self: Tensor, *shape: Any, **others: Any) -> Tensor:
        made = new_empty(self, *shape, **others)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    policy = load(awkward, "padded-vocabulary")
    sampler = engine(policy)
    with likely_line_breaks(policy):
        wanted = drawn_in_two_steps(sampler, PROMPTS[:2], range(6))
        monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
        found = drawn_in_two_steps(sampler, PROMPTS[:2], range(6))
    lengths = {first.node.batch.mask.shape[1] for first, _ in found if first.stop != "end"}
    assert len(lengths) > 1  # The second step joined batches of unlike length.
    assert [second and second.text for _, second in found] == [
        second and second.text for _, second in wanted
    ]


def test_short_draws_come_before_long_ones_and_batches_are_not_mixed(awkward: Awkward) -> None:
    policy = load(awkward, "padded-vocabulary")
    sampler = engine(policy)
    first, second = opened(sampler, PROMPTS[:2]), opened(sampler, PROMPTS[2:])
    tickets = sampler.submit(
        [
            Draw(first[0], 9, greedy=True, whole=True),
            Draw(first[1], 4, greedy=True),
            Draw(second[0], 4, greedy=True),
            Draw(first[0], 4, seed=1),
        ]
    )
    finished = []
    while group := sampler.finished():
        finished.append(sorted(ticket for ticket, _ in group))
    assert sorted(finished[:2]) == [[tickets[1], tickets[3]], [tickets[2]]]
    assert finished[2:] == [[tickets[0]]]


def test_a_greedy_draw_is_greedy_next_to_sampled_ones(awkward: Awkward) -> None:
    policy = load(awkward, "padded-vocabulary")
    sampler = engine(policy)
    root = opened(sampler, PROMPTS[:1])[0]
    (alone,) = draw_all(sampler, [Draw(root, 8, greedy=True)])
    _, mixed = draw_all(sampler, [Draw(root, 8, seed=3), Draw(root, 8, greedy=True)])
    assert mixed.text == alone.text


def test_logits_that_are_not_numbers_are_an_error(awkward: Awkward) -> None:
    policy = load(awkward, "padded-vocabulary")
    sampler = engine(policy)
    with favouring(policy.model, [7], float("nan")):
        root = opened(sampler, PROMPTS[:1])[0]
        with pytest.raises(UserError, match=r"not numbers in torch\.float32"):
            draw_all(sampler, [Draw(root, 3)])


def test_attention_of_another_kind_is_refused(awkward: Awkward) -> None:
    policy = load(awkward, "internvl")
    policy.model.config.text_config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match="linear_attention"):
        engine(policy)
