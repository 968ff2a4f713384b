"""Where the reference of DPO comes from, and what is trained of a response that was drawn."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from srccore.config import DpoConfig, LoraSettings, ModelConfig
from srccore.data.records import Candidate
from srccore.errors import UserError
from srccore.method.driver import draw_all
from srccore.method.engine import Draw, Prompt
from srccore.models.policy import (
    Policy,
    drawn_text,
    load_policy,
    load_processor,
    prompt_text,
    prompt_tokens,
)
from srccore.models.transformers import TransformersSamplingEngine
from srccore.training import shared_prompt
from srccore.training.dpo import DpoOutcome, PreferenceExample, train_dpo
from srccore.training.machine import Machine
from srccore.training.shared_prompt import Collator
from srccore.training.trainer import sample_order

POLICY = Policy(base=ModelConfig(path="embedded:lvlm"))
SIZES = [(30, 20), (20, 60), (24, 24), (50, 50)]


@pytest.fixture(scope="module")
def drawn() -> list[PreferenceExample]:
    """Preferences between responses that the policy drew."""
    loaded = load_policy(POLICY)
    engine = TransformersSamplingEngine(loaded.model, loaded.processor)
    prompts = [
        Prompt(functools.partial(tiny_models.image, *size), tiny_models.QUESTION, str(size))
        for size in SIZES
    ]
    nodes = engine.open(engine.prepare(prompts))
    draws = [Draw(node, 80, seed=seed, whole=True) for node in nodes for seed in (1, 2)]
    texts = [
        Candidate(
            id=str(number),
            text=each.text.strip(),
            drawn=each.text,
            log_probability=each.log_probability,
            token_count=each.token_count,
        )
        for number, each in enumerate(draw_all(engine, draws))
        if each.stop == "end"
    ]
    assert len(texts) == len(draws)
    pairs = zip(texts[::2], texts[1::2], prompts, strict=True)
    return [PreferenceExample(tiny_models.QUESTION, a, b, prompt.image) for a, b, prompt in pairs]


def config(**changes: Any) -> DpoConfig:
    values = {"learning_rate": 1e-12, "batch_size": 2, "lora": LoraSettings(rank=2, alpha=4)}
    return DpoConfig(**{**values, **changes})


def train(examples: list[PreferenceExample], out: Path, **changes: Any) -> DpoOutcome:
    out.mkdir()
    machine = Machine(device="cpu")
    return train_dpo(POLICY, examples, config(**changes), out, seed=0, machine=machine)


class Passes:
    """Counts the pairs of each pass of the policy, and of the reference."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.policy: list[int] = []
        self.reference: list[int] = []
        original = shared_prompt._Reader.read

        def counted(this: Any, segments: torch.Tensor, inputs: Any) -> Any:
            passes = self.policy if torch.is_grad_enabled() else self.reference
            passes.append(len(segments))
            return original(this, segments, inputs)

        patch.setattr(shared_prompt._Reader, "read", counted)


def test_the_reference_is_computed_once_however_many_epochs_there_are(
    drawn: list[PreferenceExample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(monkeypatch)
    outcome = train(drawn, tmp_path / "out", epochs=3)
    assert (passes.policy, passes.reference) == ([2] * 6, [2, 2])
    assert outcome.reward_margin == pytest.approx(0, abs=1e-5)
    # 4 pairs in 3 epochs and once for the reference, which shares the policy's images.
    work = outcome.training.work
    assert (work.prompts, work.image_encodings, work.forward_passes) == (16, 12, 8)
    # Each prompt once, and both responses, in each of the four passes over a pair.
    processor = load_processor(POLICY.base)
    prompt = prompt_text(processor, tiny_models.QUESTION)
    assert work.prefilled_tokens == 4 * sum(
        prompt_tokens(processor, prompt, pair.image().size)
        + pair.chosen.token_count
        + pair.rejected.token_count
        for pair in drawn
    )


def test_the_search_has_computed_it_already(
    drawn: list[PreferenceExample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(monkeypatch)
    outcome = train(drawn, tmp_path / "out", reference="drawn")
    # The first batch is computed to compare.
    assert (passes.policy, passes.reference) == ([2, 2], [2])
    # A reward is beta (0.1) times the log ratio to the reference, which is the policy itself.
    assert outcome.reward_margin == pytest.approx(0, abs=1e-4)


def changed(example: PreferenceExample, tokens: int, log_probability: float) -> PreferenceExample:
    assert isinstance(example.chosen, Candidate)
    found = {
        "token_count": example.chosen.token_count + tokens,
        "log_probability": example.chosen.log_probability + log_probability,
    }
    chosen = example.chosen.model_copy(update=found)
    return PreferenceExample(example.question, chosen, example.rejected, example.image)


def test_it_is_computed_for_a_response_that_is_not_encoded_as_it_was_drawn(
    drawn: list[PreferenceExample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(monkeypatch)
    examples = list(drawn)
    last = sample_order(len(drawn), config(), seed=0)[-1]
    examples[last] = changed(examples[last], tokens=1, log_probability=-1e6)
    outcome = train(examples, tmp_path / "out", reference="drawn")
    assert (passes.policy, passes.reference) == ([2, 2], [2, 2])
    assert outcome.reward_margin == pytest.approx(0, abs=1e-4)


def test_log_probabilities_of_another_policy_are_refused(
    drawn: list[PreferenceExample], tmp_path: Path
) -> None:
    examples = [changed(each, tokens=0, log_probability=-20) for each in drawn]
    with pytest.raises(UserError, match=r"not those of this policy: .* per token"):
        train(examples, tmp_path / "out", reference="drawn")


def test_what_is_trained_is_what_was_drawn(
    drawn: list[PreferenceExample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[dict[str, torch.Tensor]] = []
    original = Collator.__call__

    def call(this: Collator, samples: Any) -> dict[str, torch.Tensor]:
        batches.append(original(this, samples))
        return batches[-1]

    monkeypatch.setattr(Collator, "__call__", call)
    # Half of them begin without the space that the chat template writes.
    examples = [
        PreferenceExample(e.question, e.chosen.model_copy(update={"drawn": e.chosen.text}),
                          e.rejected, e.image)
        for e in drawn
    ]  # fmt: skip
    train(examples, tmp_path / "out")
    tokenizer = load_policy(POLICY).processor.tokenizer
    trained = {
        tokenizer.decode(row[mask.bool()], clean_up_tokenization_spaces=False)
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    }
    wanted = [said.drawn for each in examples for said in (each.chosen, each.rejected)]
    assert trained == {f"{text}</s>" for text in wanted}
    assert {text[0] == " " for text in wanted} == {True, False}


def test_drawn_text_keeps_white_space_and_nothing_that_is_no_text() -> None:
    processor = load_policy(POLICY).processor
    assert drawn_text(processor, "It is red. ") == "It is red. </s>"
    assert drawn_text(processor, " It is</s> red.") == " It is red.</s>"
