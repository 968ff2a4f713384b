"""The engine on vLLM draws what the policy says, as the engine on transformers does."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from awkward.checkpoints import images
from safetensors.torch import load_file, save_file

from srccore.config import EngineConfig, ModelConfig, load_config
from srccore.embedded.world import make_item
from srccore.errors import UserError
from srccore.method.driver import draw_all
from srccore.method.engine import Continuation, Draw, Prompt
from srccore.models.policy import LoadedPolicy, Policy, load_policy
from srccore.models.transformers import TransformersSamplingEngine, encode_prompts
from srccore.models.vllm import VllmSamplingEngine

pytestmark = pytest.mark.vllm
CONFIG = EngineConfig(name="vllm", sequences=64)
ITEMS = [make_item(0, "calibration", number) for number in range(6)]
PROMPTS = [Prompt(partial(getattr, i, "image"), i.sample.question, i.sample.id) for i in ITEMS]


@dataclasses.dataclass(frozen=True)
class Engines:
    vllm: VllmSamplingEngine
    transformers: TransformersSamplingEngine
    loaded: LoadedPolicy

    def both(self, prompts: list[Prompt], **draw: Any) -> list[tuple[Continuation, Continuation]]:
        """One continuation of each prompt, from either engine."""
        drawn = [
            draw_all(engine, [Draw(node, **draw) for node in opened(engine, prompts)])
            for engine in (self.vllm, self.transformers)
        ]
        return list(zip(*drawn, strict=True))


def opened(engine: Any, prompts: list[Prompt]) -> list[Any]:
    return engine.open(engine.prepare(prompts))  # type: ignore[no-any-return]


def load(policy: Policy) -> Engines:
    loaded = load_policy(policy)
    plain = TransformersSamplingEngine(loaded.model, loaded.processor)
    return Engines(VllmSamplingEngine(policy, "cpu", CONFIG, draws=8), plain, loaded)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """A trained policy with two adapters on top, as after two rounds."""
    base = load_config("tiny").model
    folder = tmp_path_factory.mktemp("adapters")
    policy = Policy(base=base)
    for rank in (2, 4):
        adapter = tiny_models.adapter(base, folder / str(rank), rank, seed=rank)
        weights = adapter / "adapter_model.safetensors"
        save_file({name: each * 0.1 for name, each in load_file(weights).items()}, weights)
        policy = policy.with_adapter(adapter)
    yield load(policy)
    gc.collect()


def assert_equal(ours: Continuation, theirs: Continuation) -> None:
    assert (ours.text, ours.stop, ours.token_count) == (
        theirs.text,
        theirs.stop,
        theirs.token_count,
    )
    assert ours.log_probability == pytest.approx(theirs.log_probability, abs=1e-4)


def test_greedy_responses_are_those_of_transformers(tiny: Engines) -> None:
    for ours, theirs in tiny.both(PROMPTS, max_tokens=80, greedy=True, whole=True):
        assert_equal(ours, theirs)
        assert ours.stop == "end"
        assert ours.node is None


def test_sentence_by_sentence_gives_the_same_response(tiny: Engines) -> None:
    whole = tiny.both(PROMPTS, max_tokens=80, greedy=True, whole=True)
    for prompt, (expected, _) in zip(PROMPTS, whole, strict=True):
        (node,) = opened(tiny.vllm, [prompt])
        text, score = "", 0.0
        while node is not None:
            (drawn,) = draw_all(tiny.vllm, [Draw(node, max_tokens=40, greedy=True)])
            text, score, node = text + drawn.text, score + drawn.log_probability, drawn.node
        assert text == expected.text
        # What is dropped and drawn again counts once.
        assert score == pytest.approx(expected.log_probability, abs=1e-4)


def test_log_probabilities_are_those_of_a_fresh_forward_pass(tiny: Engines) -> None:
    (node,) = opened(tiny.vllm, PROMPTS[:1])
    # Some end at once, and a node has the tokens of the others.
    drawn = draw_all(tiny.vllm, [Draw(node, 24, seed, temperature=2.0) for seed in range(8)])
    going_on = [each for each in drawn if each.node is not None]
    assert going_on
    prompt = encode_prompts(tiny.loaded.processor, PROMPTS[:1])
    for each in going_on:
        said = torch.tensor([each.node.tokens])
        ids = torch.cat([prompt["input_ids"], said], dim=1)
        with torch.no_grad():
            logits = tiny.loaded.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=prompt["pixel_values"],
            ).logits
        scores = logits[:, -said.shape[1] - 1 : -1].log_softmax(-1).gather(2, said[..., None])
        assert each.token_count == said.shape[1]
        assert each.log_probability == pytest.approx(float(scores.sum()), abs=1e-4)


def test_a_draw_does_not_depend_on_what_runs_beside_it(tiny: Engines) -> None:
    seed = 2**64 - 5
    (node,) = opened(tiny.vllm, PROMPTS[:1])
    (alone,) = draw_all(tiny.vllm, [Draw(node, 24, seed, temperature=1.5)])
    others = [Draw(each, 24, 7, temperature=1.5) for each in opened(tiny.vllm, PROMPTS[1:])]
    *_, beside = draw_all(tiny.vllm, [*others, Draw(node, 24, seed, temperature=1.5)])
    assert (beside.text, beside.token_count) == (alone.text, alone.token_count)
    assert beside.log_probability == pytest.approx(alone.log_probability, abs=1e-4)
    texts = {each.text for each in draw_all(tiny.vllm, [Draw(node, 24, s, 1.5) for s in range(12)])}
    assert len(texts) > 1


def test_every_image_is_encoded_once_and_prompts_are_read_from_the_cache(tiny: Engines) -> None:
    model = tiny.vllm._engine.model_executor.driver_worker.worker.get_model()
    encoded = []
    handle = model.vision_tower.register_forward_hook(
        lambda _module, inputs, _output: encoded.append(len(inputs[0]))
    )
    prompts = [dataclasses.replace(prompt, key=f"again-{prompt.key}") for prompt in PROMPTS]
    try:
        before = dataclasses.replace(tiny.vllm.work)
        nodes = opened(tiny.vllm, prompts)
        first = draw_all(tiny.vllm, [Draw(node, 24, seed) for node in nodes for seed in range(4)])
        live = [each.node for each in first if each.node is not None]
        draw_all(tiny.vllm, [Draw(node, 24, seed) for node in live for seed in range(4)])
    finally:
        handle.remove()
    assert sum(encoded) == len(prompts)
    assert tiny.vllm.work.image_encodings - before.image_encodings == len(prompts)
    assert live
    # Blocks of 32 tokens are shared, and a prompt has about 50: less than two thirds are read.
    requests = 4 * (len(nodes) + len(live))
    assert (
        tiny.vllm.work.prefilled_tokens - before.prefilled_tokens
        < requests * 50 * 2 / 3 + len(nodes) * 32
    )


def test_an_image_is_processed_once_and_sent_once(
    tiny: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bool] = []
    add = tiny.vllm._engine.add_request

    def recorded(ticket: str, request: dict[str, Any], parameters: Any) -> None:
        (image,) = request["mm_kwargs"]["image"]
        sent.append(image is not None)
        add(ticket, request, parameters)

    monkeypatch.setattr(tiny.vllm._engine, "add_request", recorded)
    processed = []
    image = PROMPTS[0].image

    def load() -> Any:
        processed.append(1)
        return image()

    (node,) = opened(tiny.vllm, [dataclasses.replace(PROMPTS[0], image=load, key="sent-once")])
    (first, *_) = draw_all(tiny.vllm, [Draw(node, 4, seed, whole=True) for seed in range(3)])
    draw_all(tiny.vllm, [Draw(first.node, 4, seed) for seed in range(3)])
    assert sent == [True, False, False, False, False, False]
    assert processed == [1]


def test_open_prompts_leave_room_in_the_cache(
    tiny: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 64 sequences, 8 draws to a prompt: 24 prompts fill a queue of three times as many draws.
    (node,) = opened(tiny.vllm, PROMPTS[:1])
    assert tiny.vllm.in_flight == 24
    monkeypatch.setattr(tiny.vllm, "_longest_prompt", len(node.prompt.tokens))
    monkeypatch.setattr(tiny.vllm, "_cached_tokens", 2 * 5 * len(node.prompt.tokens) + 1)
    assert tiny.vllm.in_flight == 5
    monkeypatch.setattr(tiny.vllm, "_cached_tokens", 10)
    assert tiny.vllm.in_flight == 1


def test_no_banned_token_is_drawn(tiny: Engines) -> None:
    (node,) = opened(tiny.vllm, PROMPTS[:1])
    drawn = draw_all(
        tiny.vllm, [Draw(node, 24, seed, temperature=2.0, whole=True) for seed in range(16)]
    )
    tokens = {token for each in drawn if each.node is not None for token in each.node.tokens}
    assert tokens
    assert not tokens & set(tiny.vllm._vocabulary.banned)


def test_a_prompt_that_leaves_no_room_names_the_setting(tiny: Engines) -> None:
    (node,) = opened(tiny.vllm, PROMPTS[:1])
    with pytest.raises(UserError, match=r"engine\.max_length") as caught:
        tiny.vllm.submit([Draw(node, max_tokens=500)])
    assert ITEMS[0].sample.question in str(caught.value)
    assert "more than the 512" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "padded-vocabulary",
        "padded-to-square",
        "llava-next-shapes",
        "sliding-window",
        "qwen2.5-vl",
        "smolvlm",
        "internvl",
    ],
)
def test_awkward_checkpoints_answer_as_with_transformers(
    awkward: Callable[[str], ModelConfig], name: str, temporary: Path
) -> None:
    engines = load(Policy(base=awkward(name)))
    # The merged policy, as large as the model, is on the disk only while vLLM loads it.
    assert not list(temporary.glob("srccore-policy-*"))
    prompts = [tiny_models.prompt(image) for image in images()]
    pairs = engines.both(prompts, max_tokens=32, greedy=True, whole=True)
    pairs += engines.both(prompts, max_tokens=32, greedy=True)
    for ours, theirs in pairs:
        assert_equal(ours, theirs)


def test_a_policy_in_bfloat16_is_scored_in_bfloat16(awkward: Callable[[str], ModelConfig]) -> None:
    engines = load(Policy(base=awkward("bfloat16")))
    prompts = [tiny_models.prompt(image) for image in images()]
    for ours, theirs in engines.both(prompts, max_tokens=1, greedy=True):
        # Eight bits of a logit.
        assert ours.log_probability == pytest.approx(theirs.log_probability, rel=0.02)


def test_a_temperature_beyond_that_of_vllm_names_the_setting(tiny: Engines) -> None:
    (node,) = opened(tiny.vllm, PROMPTS[:1])
    with pytest.raises(UserError, match=r"search\.temperature"):
        tiny.vllm.submit([Draw(node, max_tokens=5, temperature=2.5)])
