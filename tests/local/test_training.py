from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from srccore.config import (
    DpoConfig,
    LoraSettings,
    ModelConfig,
    RationaleTuningConfig,
    ScorerConfig,
)
from srccore.embedded.model import RATING_TEMPLATE
from srccore.errors import UserError
from srccore.models.families import language_model_targets
from srccore.models.folding import read_adapter
from srccore.models.policy import (
    Policy,
    load_policy,
    load_processor,
    prompt_text,
    response_text,
)
from srccore.models.rating import encode_rating_prompts, single_token
from srccore.training import dpo
from srccore.training.dpo import PreferenceExample, train_dpo
from srccore.training.machine import Machine
from srccore.training.rationale import RationaleExample, tune_rationale
from srccore.training.scorer import RatingExample, train_scorer
from srccore.training.scorer import _pack as pack_rows
from srccore.training.shared_prompt import Collator
from srccore.training.trainer import longest_first, lora_config, sample_order

base = tiny_models.base
LORA = LoraSettings(rank=2, alpha=4)
QUESTION, RESPONSE, OTHER = tiny_models.QUESTION, tiny_models.RESPONSE, tiny_models.OTHER


def rationale_config(**changes: Any) -> RationaleTuningConfig:
    values = {"samples": 4, "learning_rate": 0.01, "batch_size": 2, "lora": LORA, **changes}
    return RationaleTuningConfig(**values)


def dpo_config(**changes: Any) -> DpoConfig:
    return DpoConfig(**{"learning_rate": 0.01, "batch_size": 2, "lora": LORA, **changes})


def rationale_examples() -> list[RationaleExample]:
    # Images of different shapes are split differently by LLaVA-NeXT.
    shapes = [(30, 20), (20, 60), (24, 24), (50, 50)]
    return [
        RationaleExample(QUESTION, RESPONSE, lambda shape=shape: tiny_models.image(*shape))
        for shape in shapes
    ]


def preferences() -> list[PreferenceExample]:
    return [
        PreferenceExample(example.question, example.response, OTHER + " It is.", example.image)
        for example in rationale_examples()
    ]


class Batches:
    """Keeps what a collator feeds to the model."""

    def __init__(self, patch: pytest.MonkeyPatch, collator: type, method: str = "__call__") -> None:
        self.seen: list[dict[str, Any]] = []
        original = getattr(collator, method)

        def call(this: Any, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = original(this, examples)
            self.seen.append({name: value.clone() for name, value in batch.items()})
            return batch

        patch.setattr(collator, method, call)


def inference_ids(processor: Any, picture: Any, response: str) -> tuple[list[int], list[int]]:
    """The prompt's ids as an engine sees them, and the ids of the response after it and its end."""
    prompt = processor(
        images=[[picture]],
        text=[prompt_text(processor, QUESTION)],
        add_special_tokens=False,
        return_tensors="pt",
    )["input_ids"][0].tolist()
    encode = processor.tokenizer.encode
    tail = encode(response_text(processor, response), add_special_tokens=False)
    assert tail[-1] == processor.tokenizer.eos_token_id
    return prompt, tail


def rows(batch: dict[str, Any]) -> list[list[int]]:
    pairs = zip(batch["row_ids"], batch["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


def test_rationale_tuning_sees_the_ids_of_inference_and_learns_the_response_only(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches(monkeypatch, Collator)
    told: list[tuple[int, int]] = []
    examples = rationale_examples()
    outcome = tune_rationale(
        Policy(base=base),
        examples,
        rationale_config(),
        tmp_path,
        seed=0,
        machine=Machine(progress=lambda done, total, tokens=0: told.append((done, total))),
    )
    assert (outcome.steps, outcome.samples, outcome.skipped) == (2, 4, 0)
    assert math.isfinite(outcome.last_loss)
    assert told == [(1, 2), (2, 2)]
    processor = load_processor(base)
    expected = [inference_ids(processor, example.image(), RESPONSE) for example in examples]
    assert sorted(row for batch in batches.seen for row in rows(batch)) == sorted(
        prompt + tail for prompt, tail in expected
    )
    learnt = [labels[labels != -100].tolist() for b in batches.seen for labels in b["labels"]]
    assert learnt == [expected[0][1]] * 4
    if "next" in base.path:
        assert len({len(prompt) for prompt, _ in expected}) > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "checkpoint"]
    check_adapter(base, tmp_path / "adapter")


def check_adapter(base: ModelConfig, path: Path) -> None:
    """Checks that exactly the language model's linear layers have changed."""
    before = load_policy_weights(base)
    changed = {
        name
        for name, weight in load_policy(
            Policy(base=base).with_adapter(path)
        ).model.named_parameters()
        if not torch.equal(weight, before[name])
    }
    assert changed == {f"{name}.weight" for name in read_adapter(path).pairs}
    assert all("language_model.layers" in name for name in changed)
    assert len(changed) == 2 * 7


def load_policy_weights(base: ModelConfig) -> dict[str, Any]:
    return dict(load_policy(Policy(base=base)).model.named_parameters())


def test_dpo_sees_the_ids_of_inference_and_starts_from_its_reference(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches(monkeypatch, Collator)
    policy = Policy(base=base).with_adapter(tiny_models.adapter(base, tmp_path / "first", 2, 1))
    out = tmp_path / "dpo"
    out.mkdir()
    examples = preferences()[:2]
    # With a tiny learning rate every step sees the reference itself.
    outcome = train_dpo(policy, examples, dpo_config(learning_rate=1e-12, epochs=2), out, seed=0)
    assert outcome.training.steps == 2
    assert outcome.reward_margin == pytest.approx(0, abs=1e-5)
    loaded = load_policy(policy)
    expected, sums = [], []
    for example in examples:
        row: list[int] = []
        for response in (example.chosen, example.rejected):
            prompt, tail = inference_ids(loaded.processor, example.image(), response)
            row = (row or prompt) + tail
            sums.append(log_probability(loaded, example.image(), response))
        expected.append(row)
    assert sorted(rows(batches.seen[0])) == sorted(expected)
    # The incoming adapter is part of the reference: these are the folded policy's values.
    assert outcome.chosen_log_probability == pytest.approx((sums[0] + sums[2]) / 2, rel=1e-4)
    assert outcome.rejected_log_probability == pytest.approx((sums[1] + sums[3]) / 2, rel=1e-4)
    # Both log ratios are 0, so the loss is -log sigmoid(0) - 0.02 x the mean log-probability of
    # the two chosen responses.
    wanted = math.log(2) - 0.02 * (sums[0] + sums[2]) / 2
    assert outcome.training.last_loss == pytest.approx(wanted, rel=1e-4)


def with_dropout_of_its_own(base: ModelConfig, out: Path) -> ModelConfig:
    shutil.copytree(base.path, out)
    config = json.loads((out / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["attention_dropout"] = 0.5
    (out / "config.json").write_text(json.dumps(config))
    return base.model_copy(update={"path": str(out)})


def test_dropout_changes_what_dpo_trains_and_not_its_reference(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[Any] = []
    monkeypatch.setattr(
        dpo, "step_figures", lambda trainer, name: [trainers.append(trainer), [0.0]][1]
    )
    base = with_dropout_of_its_own(base, tmp_path / "base")
    examples = preferences()
    found = []
    for dropout in (0.0, 0.5):
        out = tmp_path / str(dropout)
        out.mkdir()
        lora = LoraSettings(rank=2, alpha=4, dropout=dropout)
        config = dpo_config(lora=lora, batch_size=4, epochs=3)
        train_dpo(Policy(base=base), examples, config, out, seed=0)
        found.append(read_adapter(out / "adapter").pairs)
    assert any(not torch.equal(b, found[1][module][1]) for module, (_, b) in found[0].items())
    loaded = load_policy(Policy(base=base))
    for response in ("chosen", "rejected"):
        sums = [log_probability(loaded, e.image(), getattr(e, response)) for e in examples]
        # A reward is beta (0.1) times the log ratio, so this is the mean of the reference's sums.
        references = [
            entry[f"logps/{response}"] - entry[f"rewards/{response}"] / 0.1
            for entry in trainers[-1].state.log_history
            if f"logps/{response}" in entry
        ]
        assert references == pytest.approx([sum(sums) / 4] * 3, rel=1e-4)


def test_every_round_starts_from_another_adapter(tmp_path: Path) -> None:
    base = ModelConfig(path="embedded:lvlm")
    policies = [Policy(base=base)]
    policies.append(policies[0].with_adapter(tiny_models.adapter(base, tmp_path / "first", 2, 1)))
    found = []
    for policy in policies:
        out = tmp_path / str(len(policy.adapters))
        out.mkdir()
        # With a tiny learning rate, A stays what it was at the start.
        train_dpo(policy, preferences()[:2], dpo_config(learning_rate=1e-12), out, seed=0)
        found.append(read_adapter(out / "adapter").pairs)
    for module, (a, _) in found[0].items():
        assert (a - found[1][module][0]).norm() > a.norm() / 2


LENGTHS = ("", " It is.", " So it is, and no other way.", " It is not four, but three.")
"""Ends of responses that differ in length."""


def uneven_preferences() -> list[PreferenceExample]:
    return [
        PreferenceExample(example.question, example.chosen + end, example.rejected, example.image)
        for example, end in zip(preferences(), LENGTHS, strict=True)
    ]


SHARES = [(4, 1), (2, 2), (1, 4)]
"""Samples of a forward pass, and forward passes of an optimiser step."""


@pytest.mark.parametrize("normalization", ["response", "token"])
@pytest.mark.parametrize("share", SHARES)
def test_the_sft_term_is_a_mean_over_the_responses_or_tokens_of_a_whole_step(
    tmp_path: Path, share: tuple[int, int], normalization: str
) -> None:
    # The model has learned some words and not others, so texts differ in how likely they are.
    base = ModelConfig(path="embedded:lvlm")
    samples, passes = share
    config = dpo_config(
        batch_size=samples,
        gradient_accumulation_steps=passes,
        learning_rate=1e-12,
        sft_weight=1.0,
        sft_normalization=normalization,
    )
    examples = uneven_preferences()
    outcome = train_dpo(Policy(base=base), examples, config, tmp_path, seed=0)
    assert outcome.training.steps == 1
    loaded = load_policy(Policy(base=base))
    total, tokens, means = 0.0, 0, []
    for example in examples:
        found = log_probability(loaded, example.image(), example.chosen)
        count = len(inference_ids(loaded.processor, example.image(), example.chosen)[1])
        total, tokens, means = total + found, tokens + count, [*means, found / count]
    # The policy is its own reference, so the first term is -log sigmoid(0).
    wanted = math.log(2) - total / {"response": len(examples), "token": tokens}[normalization]
    assert outcome.training.last_loss == pytest.approx(wanted, rel=1e-4)
    # The mean of the samples' means is a different number from both.
    assert abs(total / tokens - sum(means) / 4) > 0.05


@pytest.mark.parametrize("normalization", ["response", "token"])
def test_how_a_batch_is_accumulated_changes_no_adapter(
    base: ModelConfig, tmp_path: Path, normalization: str
) -> None:
    found = []
    for samples, passes in SHARES:
        out = tmp_path / str(samples)
        out.mkdir()
        config = dpo_config(
            batch_size=samples,
            gradient_accumulation_steps=passes,
            sft_weight=1.0,
            sft_normalization=normalization,
            epochs=3,
        )
        train_dpo(Policy(base=base), uneven_preferences(), config, out, seed=3)
        found.append(read_adapter(out / "adapter").pairs)
    for other in found[1:]:
        for module, matrices in found[0].items():
            for left, right in zip(matrices, other[module], strict=True):
                torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-3)


def test_every_epoch_is_another_order_and_its_last_batch_is_filled_up_from_its_beginning() -> None:
    config = dpo_config(batch_size=2, gradient_accumulation_steps=2, epochs=2.5)
    order = sample_order(6, config, seed=0)
    # 6 samples make 2 steps of 4 in an epoch; 2.5 epochs are 5 steps.
    assert len(order) == 20
    epochs = [order[:8], order[8:16]]
    for epoch in epochs:
        assert sorted(epoch[:6]) == list(range(6))
        assert epoch[6:] == epoch[:2]
    assert epochs[0] != epochs[1]
    assert order[:8] == sample_order(6, config, seed=0)[:8] != sample_order(6, config, seed=1)[:8]
    # If there are fewer samples than one step takes, they are repeated.
    (first, second) = sample_order(2, dpo_config(batch_size=5), seed=0)[:2]
    assert sample_order(2, dpo_config(batch_size=5), seed=0) == [
        first,
        second,
        first,
        second,
        first,
    ]


@given(st.data(), st.integers(1, 5), st.integers(1, 4))
def test_the_samples_of_each_step_are_sorted_and_no_sample_changes_its_step(
    data: st.DataObject, batch: int, steps: int
) -> None:
    tokens = data.draw(st.lists(st.integers(1, 9), min_size=6, max_size=6))
    order = data.draw(st.lists(st.integers(0, 5), min_size=batch * steps, max_size=batch * steps))
    found = longest_first(order, tokens, batch)
    for start in range(0, len(order), batch):
        step = found[start : start + batch]
        assert sorted(step) == sorted(order[start : start + batch])
        lengths = [tokens[each] for each in step]
        assert lengths == sorted(lengths, reverse=True)


def log_probability(loaded: Any, picture: Any, response: str) -> float:
    prompt, tail = inference_ids(loaded.processor, picture, response)
    batch = loaded.processor(
        images=[[picture]],
        text=[prompt_text(loaded.processor, QUESTION)],
        add_special_tokens=False,
        return_tensors="pt",
    )
    batch["input_ids"] = torch.tensor([prompt + tail])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        logits = loaded.model(**batch).logits[0, -len(tail) - 1 : -1]
    chosen = logits.log_softmax(-1)[torch.arange(len(tail)), torch.tensor(tail)]
    return float(chosen.sum())


def test_dpo_learns_to_prefer_and_changes_the_language_model_only(
    base: ModelConfig, tmp_path: Path
) -> None:
    outcome = train_dpo(Policy(base=base), preferences(), dpo_config(epochs=3), tmp_path, seed=0)
    assert outcome.training.steps == 6
    assert outcome.reward_margin > 0
    assert outcome.reward_accuracy == 1
    check_adapter(base, tmp_path / "adapter")


def test_a_sample_longer_than_the_context_is_skipped_and_counted(
    base: ModelConfig, tmp_path: Path
) -> None:
    long = RationaleExample(QUESTION, RESPONSE * 80, tiny_models.image)
    examples = [*rationale_examples()[:2], long]
    outcome = tune_rationale(Policy(base=base), examples, rationale_config(), tmp_path, seed=0)
    assert (outcome.samples, outcome.skipped) == (2, 1)
    with pytest.raises(UserError, match="None of 1 training samples"):
        tune_rationale(Policy(base=base), [long], rationale_config(), tmp_path, seed=0)


def test_the_same_seed_gives_the_same_adapter(base: ModelConfig, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tune_rationale(
            Policy(base=base), rationale_examples(), rationale_config(), tmp_path / name, seed=3
        )
        found.append(read_adapter(tmp_path / name / "adapter").pairs)
    for module, (a, b) in found[0].items():
        assert torch.equal(a, found[1][module][0])
        assert torch.equal(b, found[1][module][1])


@pytest.mark.parametrize("change", ["gradient_checkpointing", "gradient_accumulation_steps"])
def test_savings_of_memory_change_no_adapter(
    base: ModelConfig, tmp_path: Path, change: str
) -> None:
    # Two batches of 1 accumulated are one batch of 2: all responses have equally many tokens.
    saving: dict[str, Any] = {
        "gradient_checkpointing": {"gradient_checkpointing": True},
        "gradient_accumulation_steps": {"gradient_accumulation_steps": 2, "batch_size": 1},
    }[change]
    found = []
    for name, changes in (("plain", {}), ("saving", saving)):
        (tmp_path / name).mkdir()
        config = dpo_config(lora=LORA, **changes)
        train_dpo(Policy(base=base), preferences(), config, tmp_path / name, seed=3)
        found.append(read_adapter(tmp_path / name / "adapter").pairs)
    for module, matrices in found[0].items():
        for left, right in zip(matrices, found[1][module], strict=True):
            torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-3)


def test_training_says_nothing_of_its_own(
    base: ModelConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tune_rationale(Policy(base=base), rationale_examples(), rationale_config(), tmp_path, seed=0)
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def rating_base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("rating")
    words = tiny_models.tokenizer("embedded")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words.chat_template = RATING_TEMPLATE
    words.save_pretrained(folder)
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lora_is_trained_in_float32_whatever_the_weights_are(base: ModelConfig, dtype: str) -> None:
    from peft import get_peft_model

    loaded = load_policy(Policy(base=base.model_copy(update={"dtype": dtype})))
    model = get_peft_model(loaded.model, lora_config(LORA, language_model_targets(loaded.model)))
    trained = [each for each in model.parameters() if each.requires_grad]
    # A scaled loss (fp16) needs gradients in float32.
    assert {each.dtype for each in trained} == {torch.float32}
    assert loaded.model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_scorer_keeps_updates_that_bfloat16_would_round_away(
    rating_base: ModelConfig, tmp_path: Path, lora: LoraSettings | None
) -> None:
    from transformers import AutoModelForCausalLM

    base = rating_base.model_copy(update={"dtype": "bfloat16"})
    config = ScorerConfig(learning_rate=1e-5, batch_size=2, lora=lora)
    train_scorer(base, [RatingExample(RESPONSE, 1)] * 4, config, tmp_path, seed=0)
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").state_dict()
    assert {each.dtype for each in weights.values()} == {torch.float32}
    trained = weights["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(trained, trained.bfloat16().float())


@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        (None, {"batch_size": 4}),
        (LORA, {"batch_size": 4, "gradient_checkpointing": True}),
        (None, {"batch_size": 2, "gradient_accumulation_steps": 2}),
    ],
)
def test_packed_prompts_give_the_losses_of_padded_ones(
    rating_base: ModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lora: LoraSettings | None,
    changes: dict[str, Any],
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from peers import padded_training

    # The first two share their start, and the lengths differ.
    examples = [
        RatingExample(f"{start}{RESPONSE}{' More.' * number}", 1 + number)
        for number, start in enumerate(("First: ", "First: ", "Second: ", ""))
    ]
    config = ScorerConfig(learning_rate=0.01, epochs=5, lora=lora, **changes)
    losses: list[float] = []
    monkeypatch.setattr(
        "srccore.training.trainer.final_mean", lambda values: losses.extend(values) or values[-1]
    )
    train_scorer(rating_base, examples, config, tmp_path, seed=0)
    monkeypatch.undo()
    wanted = padded_training.train(rating_base, examples, config, tmp_path, seed=0)
    assert len(wanted) == 5
    assert losses[5:] == pytest.approx(wanted, abs=1e-5)
    assert wanted[-1] < wanted[0] - 0.1


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_scorer_learns_one_token_per_prompt(
    rating_base: ModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lora: LoraSettings | None,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seen: list[dict[str, Any]] = []

    def kept(rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(rows)
        return pack_rows(rows)

    monkeypatch.setattr("srccore.training.scorer._pack", kept)
    examples = [
        RatingExample(f"First: {RESPONSE}{' More.' * number}", 1 + 4 * (number % 2))
        for number in range(4)
    ]
    too_long = RatingExample(RESPONSE * 40, 3)
    config = ScorerConfig(learning_rate=0.02, batch_size=2, epochs=10, lora=lora)
    outcome = train_scorer(rating_base, [*examples, too_long], config, tmp_path, seed=0)
    assert (outcome.training.samples, outcome.training.skipped) == (4, 1)
    assert outcome.training.last_loss < outcome.training.first_loss
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    one, five = single_token(tokenizer, "1"), single_token(tokenizer, "5")
    prompts = encode_rating_prompts(tokenizer, [example.prompt for example in examples])
    # Each prompt in every epoch, with its own rating after it.
    wanted = 10 * list(zip(prompts, [one, five, one, five], strict=True))
    assert sorted((row["input_ids"], row["rating"]) for row in seen) == sorted(wanted)
    assert {row["input_ids"].count(tokenizer.bos_token_id) for row in seen} == {1}
    before = AutoModelForCausalLM.from_pretrained(rating_base.path).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert set(after) == set(before)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    if lora:
        assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model"]
