"""A prompt that responses share: they see what they would see in rows of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from awkward.checkpoints import CHECKPOINTS, SHAPES
from hypothesis import given
from hypothesis import strategies as st

from srccore.config import DpoConfig, LoraSettings, ModelConfig, RationaleTuningConfig
from srccore.models.policy import Policy
from srccore.training import shared_prompt
from srccore.training.dpo import PreferenceExample, train_dpo
from srccore.training.machine import Machine
from srccore.training.rationale import RationaleExample, tune_rationale
from srccore.training.resume import resumable
from srccore.training.shared_prompt import PADDING, Layout
from srccore.training.trainer import Row, train_adapter

Awkward = Callable[[str], ModelConfig]
LORA = LoraSettings(rank=2, alpha=4)
TOLERANCE = 1e-4
ONE_OF_EACH_FAMILY = ["cropping", "llava-next-shapes", "qwen2.5-vl", "smolvlm", "internvl"]


def preferences() -> list[PreferenceExample]:
    """One for each shape of an image, with responses of other lengths in each."""
    return [
        PreferenceExample(
            tiny_models.QUESTION + " Is it high?" * number,
            tiny_models.RESPONSE + " It is." * (3 - number),
            tiny_models.OTHER + " So it is." * number,
            functools.partial(tiny_models.image, *shape),
        )
        for number, shape in enumerate(SHAPES)
    ]


def settings(training: str, **changes: Any) -> Any:
    values = {"learning_rate": 1e-3, "batch_size": 4, "lora": LORA, **changes}
    if training == "rationale":
        return RationaleTuningConfig(samples=4, **values)
    return DpoConfig(sft_weight=0.5, sft_normalization="token", **values)


def probing(trainer: type[Any], seen: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> Any:
    """Makes a trainer that starts from a random adapter, and keeps losses and gradients."""

    class Probe(trainer):  # type: ignore[misc]
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            chance = torch.Generator().manual_seed(0)
            for name, weight in self.model.named_parameters():
                if "lora_B" in name:
                    weight.data.normal_(0, 0.1, generator=chance)

        def training_step(self, model: Any, *given: Any, **named: Any) -> Any:
            loss = super().training_step(model, *given, **named)
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
            seen.append((loss, grads))
            return loss

    return Probe


def by_us(training: str, policy: Policy, config: Any, out: Path) -> dict[str, float]:
    """Trains on the preferences, or on their chosen responses; returns figures by TRL's names."""
    machine = Machine(device="cpu")
    if training == "rationale":
        chosen = [RationaleExample(e.question, e.chosen, e.image) for e in preferences()]
        return {
            "loss": tune_rationale(policy, chosen, config, out, seed=0, machine=machine).last_loss
        }
    outcome = train_dpo(policy, preferences(), config, out, seed=0, machine=machine)
    return {
        "loss": outcome.training.last_loss,
        "rewards/margins": outcome.reward_margin,
        "logps/chosen": outcome.chosen_log_probability,
        "logps/rejected": outcome.rejected_log_probability,
    }


def by_trl(training: str, policy: Policy, config: Any, out: Path, trainer: Any) -> dict[str, float]:
    """Trains on the same with TRL's own trainer and collator; returns its log."""
    from trl import DPOConfig, SFTConfig

    if training == "rationale":
        texts = [{"completion": each.chosen} for each in preferences()]
        own: Any = functools.partial(SFTConfig, completion_only_loss=True)
    else:
        texts = [{"chosen": each.chosen, "rejected": each.rejected} for each in preferences()]
        own = functools.partial(
            DPOConfig,
            beta=config.beta,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, config.sft_weight],
            disable_dropout=False,
        )
    _, trained = train_adapter(
        policy,
        [Row(e.question, said, e.image) for e, said in zip(preferences(), texts, strict=True)],
        config,
        out,
        seed=0,
        machine=Machine(device="cpu"),
        trainer=lambda arguments, **parts: resumable(trainer)(args=own(**arguments), **parts),
    )
    log: dict[str, float] = trained.state.log_history[0]
    return log


def compare(
    training: str, policy: Policy, config: Any, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    """Compares the first step of a training with that of plain TRL."""
    import trl

    name = {"rationale": "SFTTrainer", "dpo": "DPOTrainer"}[training]
    original, ours, theirs = getattr(trl, name), [], []
    (tmp_path / "trl").mkdir()
    log = by_trl(training, policy, config, tmp_path / "trl", probing(original, theirs))
    patch.setattr(trl, name, probing(original, ours))
    figures = by_us(training, policy, config, tmp_path)
    for (loss, gradients), (wanted, wanted_gradients) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(loss, wanted, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(gradients, wanted_gradients, rtol=TOLERANCE, atol=TOLERANCE)
        assert max(each.abs().max() for each in gradients.values()) > 100 * TOLERANCE
    for figure, value in figures.items():
        assert value == pytest.approx(log[figure], rel=TOLERANCE, abs=TOLERANCE)
    # The random adapter makes the policy another than its reference.
    assert log.get("rewards/margins") != 0


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_loss_and_gradients_of_dpo_are_those_of_plain_trl(
    awkward: Awkward, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare("dpo", Policy(base=awkward(name)), settings("dpo"), tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_loss_and_gradients_of_rationale_tuning_are_those_of_plain_trl(
    awkward: Awkward, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare("rationale", Policy(base=awkward(name)), settings("rationale"), tmp_path, monkeypatch)


@pytest.mark.parametrize("training", ["dpo", "rationale"])
def test_they_are_with_gradient_checkpointing_too(
    awkward: Awkward, training: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(training, gradient_checkpointing=True)
    compare(training, Policy(base=awkward("qwen2.5-vl")), config, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_images_are_encoded_once_for_policy_and_reference(
    awkward: Awkward, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = shared_prompt._Reader._encode
    monkeypatch.setattr(
        shared_prompt._Reader,
        "_encode",
        lambda this, inputs: calls.append(1) or original(this, inputs),
    )
    config = settings("dpo", batch_size=2, gradient_accumulation_steps=2)
    by_us("dpo", Policy(base=awkward(name)), config, tmp_path)
    assert len(calls) == 2


rows_of_segments = st.lists(
    st.tuples(st.integers(1, 5), st.lists(st.integers(1, 4), min_size=2, max_size=2)),
    min_size=1,
    max_size=3,
)


def layout(rows: list[tuple[int, list[int]]]) -> Layout:
    length = max(prompt + sum(responses) for prompt, responses in rows)
    segments = torch.full((len(rows), length), PADDING)
    for row, (prompt, responses) in zip(segments, rows, strict=True):
        tokens = [0] * prompt + [n for n, count in enumerate(responses, 1) for _ in range(count)]
        row[: len(tokens)] = torch.tensor(tokens)
    return Layout(segments)


@given(rows_of_segments, st.none() | st.integers(1, 4))
def test_a_token_sees_what_it_would_see_in_a_row_of_its_own(
    rows: list[tuple[int, list[int]]], window: int | None
) -> None:
    made = layout(rows)
    mask = made.mask(window)[:, 0]
    of_prompts = torch.arange(mask.shape[1]).expand(len(rows), -1)
    positions = made.after_prompt(of_prompts, made.prompt_lengths)
    for number, (prompt, responses) in enumerate(rows):
        start = prompt
        for count in responses:
            own = [*range(prompt), *range(start, start + count)]
            # In a row of its own: the prompt, then the response.
            wanted = torch.ones(len(own), len(own), dtype=torch.bool).tril()
            if window is not None:
                wanted = wanted.triu(1 - window)
            assert torch.equal(mask[number][own][:, own], wanted)
            # Nothing else, which is the other response and padding.
            assert int(mask[number][own[prompt:]].sum()) == int(wanted[prompt:].sum())
            assert positions[number, own].tolist() == list(range(len(own)))
            start += count
    assert mask.any(-1).all()


def test_hidden_states_that_predict_a_response_begin_with_the_prompts_last() -> None:
    # Prompts of 2 and 1, then responses of 1 and 3, and of 2 and 1.
    found = layout([(2, [1, 3]), (1, [2, 1])]).predicting(2, 4)
    assert found[0, 0, :2].tolist() == [1, 2]
    assert found[1, 0, :4].tolist() == [1, 3, 4, 5]
    assert found[0, 1, :3].tolist() == [0, 1, 2]
    assert found[1, 1, :2].tolist() == [0, 3]
