"""The memory model against measured peaks, on a CPU.

The checkpoint is a random LLaVA of 4 M weights with 144 tokens for an image, wide enough that
caches, activations and adapters are megabytes and not lost among masks and positions. Measured are
all bytes that torch's allocator hands out at the same time, without the weights, which are loaded
before.

The tolerance is 15 %: the model leaves out small tensors, and rounds the order in which a layer's
tensors come and go.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import image

from srccore.config import (
    DpoConfig,
    LoraSettings,
    ModelConfig,
    RationaleTuningConfig,
    load_config,
    preset_names,
)
from srccore.method.driver import Search, draw_all, drive
from srccore.method.engine import Draw
from srccore.method.search import search
from srccore.models.policy import LoadedPolicy, Policy, load_policy, prompt_text, response_text
from srccore.models.rating import TransformersRatingEngine
from srccore.models.transformers import TransformersSamplingEngine
from srccore.training.dpo import PreferenceExample, train_dpo
from srccore.training.rationale import RationaleExample, tune_rationale

ROOT = Path(__file__).parents[3]
TOLERANCE = 0.15
SIDE, PATCH = 96, 8
RESPONSE = " ".join(["The red bar is three high."] * 8) + "\nAnswer: 3"


def _memory_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "memory_model", ROOT / "benchmarks" / "memory_model.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_model"] = module
    spec.loader.exec_module(module)
    return module


model_of = _memory_model()


def measured(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator has handed out at the same time during some work."""
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("wide")
    words = tiny_models.tokenizer("llava-1.5")
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=3,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=4,
            image_seq_length=(SIDE // PATCH) ** 2,
            pad_token_id=3,
            tie_word_embeddings=False,
        )
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return ModelConfig(path=str(out), chat_template="llava-1.5")


@pytest.fixture(scope="module")
def loaded(base: ModelConfig) -> LoadedPolicy:
    return load_policy(Policy(base=base))


def shape_of(loaded: LoadedPolicy) -> Any:
    patches = (SIDE // PATCH) ** 2
    return model_of.shape_of(
        loaded.model.config.to_dict(), model_of.Image(tokens=patches, patches=patches + 1)
    )


def lengths_of(loaded: LoadedPolicy, response: int) -> Any:
    text = prompt_text(loaded.processor, tiny_models.QUESTION)
    # The placeholder of the image is not text.
    prompt = len(loaded.processor.tokenizer.encode(text, add_special_tokens=False)) - 1
    return model_of.Lengths(prompt=prompt, response=response)


def prompt_length(loaded: LoadedPolicy) -> int:
    return int(shape_of(loaded).image.tokens) + int(lengths_of(loaded, 1).prompt)


def predicted(loaded: LoadedPolicy, stage: str, response: int, overrides: list[str]) -> float:
    shape = shape_of(loaded)
    config = load_config("tiny", overrides)
    found = model_of.parts(config, shape, shape, lengths_of(loaded, response), "cpu")[stage]
    return sum(value for name, value in found.items() if name != "weights")


def test_weights_are_counted_without_norms_and_projector(loaded: LoadedPolicy) -> None:
    # Projector and patches are 2.8 % of so small a model, and 0.4 % of a real one.
    assert shape_of(loaded).parameters == pytest.approx(loaded.model.num_parameters(), rel=0.03)
    # Counted by transformers on the published configuration.
    published = model_of.SHAPES["llava-hf/llava-1.5-7b-hf"]
    assert published.parameters == pytest.approx(7_063_427_072, rel=0.01)


def test_an_adapters_weights_are_counted_exactly(base: ModelConfig) -> None:
    from peft import LoraConfig, get_peft_model

    policy = load_policy(Policy(base=base))
    config = LoraConfig(r=8, target_modules=tiny_models.TARGETS)
    wrapped = get_peft_model(policy.model, config)
    trained, _ = wrapped.get_nb_trainable_parameters()
    assert shape_of(policy).adapter(8) == trained


PRESETS = [name for name in preset_names() if name != "tiny"]


def _too_large(preset: str, card: int, overrides: list[str]) -> list[str]:
    config = load_config(preset, overrides)
    policy, scorer = (model_of.SHAPES[m.path] for m in (config.model, config.rating_model))
    found = model_of.peaks(config, policy, scorer)
    for section in (config.rationale, config.dpo):
        assert section.batch_size * section.gradient_accumulation_steps == 16
    return [stage for stage, peak in found.items() if not model_of.fits(peak, card)]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fits_80_gb_and_the_documented_settings_make_it_fit_40(preset: str) -> None:
    assert _too_large(preset, 80, []) == []
    page = (ROOT / "docs" / "research.md").read_text()
    (row,) = re.findall(rf"^\| `{re.escape(preset)}` \| (.+) \|$", page, re.MULTILINE)
    settings = [setting for quoted in re.findall("`(.+?)`", row) for setting in quoted.split()]
    assert _too_large(preset, 40, settings) == []
    assert _too_large(preset, 48, settings) == []


def test_a_batch_that_is_too_large_is_found_out() -> None:
    # A token takes 0.5 MiB: 8 prompts of 704 tokens and 8 x 12 responses of 160 and 256 before and
    # after a sentence are 22 GiB, 58 prompts with responses of 512 are 34 GiB; weights 13 GiB.
    assert _too_large("llava-1.5-7b", 40, []) == ["search-candidates", "evaluate"]


def test_the_table_names_the_largest_batch_of_each_card() -> None:
    config = load_config("llava-1.5-7b")
    policy, scorer = (model_of.SHAPES[m.path] for m in (config.model, config.rating_model))
    lines = model_of.table(config, policy, scorer).splitlines()
    (search,) = (line for line in lines if line.startswith("| search-candidates"))
    assert search.endswith("| 8192 | 4096 | 4096 |")


def test_a_greedy_evaluation(loaded: LoadedPolicy) -> None:
    engine = TransformersSamplingEngine(loaded.model, loaded.processor)
    prompts = [tiny_models.prompt(image(40 + n, 30)) for n in range(6)]

    def work() -> None:
        nodes = engine.open(engine.prepare(prompts))
        draw_all(engine, [Draw(node, 64, greedy=True, whole=True) for node in nodes])

    tokens = 6 * prompt_length(loaded)
    overrides = [f"evaluation.batch_tokens={tokens}", "evaluation.max_tokens=64"]
    wanted = predicted(loaded, "evaluate", 64, overrides)
    assert measured(work) == pytest.approx(wanted, rel=TOLERANCE)


def test_a_search(loaded: LoadedPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every response is as long as it may be: no token ends a response, and no sentence ends.
    monkeypatch.setattr("srccore.models.writing.end_tokens", lambda *_: set())
    monkeypatch.setattr("srccore.models.writing.sentences.first_end", lambda *_: None)
    engine = TransformersSamplingEngine(loaded.model, loaded.processor)
    settings = {"branch": 3, "max_sentences": 2, "max_sentence_tokens": 32}
    settings["batch_tokens"] = 3 * prompt_length(loaded)
    overrides = [f"search.{name}={value}" for name, value in settings.items()]
    config = load_config("tiny", overrides).search
    wanted = predicted(loaded, "search-candidates", 2 * 32, overrides)
    searches = [
        Search(
            tiny_models.prompt(image(40 + n, 30)),
            partial(search, sample_id=str(n), config=config, seed=0, round_number=1),
        )
        for n in range(3)
    ]
    found = measured(lambda: list(drive(engine, [searches])))
    assert found == pytest.approx(wanted, rel=TOLERANCE)


def test_a_rating(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    words = tiny_models.tokenizer("embedded")
    words.chat_template = "{{ messages[0].content }}\nRating: "
    # They share nothing, and make one row.
    prompts = [" ".join([str(n), *[tiny_models.QUESTION] * (30 + n)]) for n in range(8)]
    tokens = sum(len(words.encode(prompt + "\nRating: ")) for prompt in prompts)
    engine = TransformersRatingEngine(Qwen2ForCausalLM(config), words, tokens)
    shape = model_of.shape_of(config.to_dict())
    run = load_config("tiny", [f"scoring.batch_tokens={tokens}"])
    lengths = model_of.Lengths(response=tokens // len(prompts))
    found = model_of.parts(run, shape, shape, lengths, "cpu")
    wanted = sum(v for name, v in found["score-candidates"].items() if name != "weights")
    found_bytes = measured(lambda: engine.next_token_distribution(prompts, ["1", "2"]))
    assert found_bytes == pytest.approx(wanted, rel=TOLERANCE)


@pytest.fixture
def unloaded(base: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> LoadedPolicy:
    """A policy that a training uses as if it loaded it; TRL's tile fits the small vocabulary."""
    policy = load_policy(Policy(base=base))
    monkeypatch.setattr("srccore.training.trainer.load_policy", lambda *_: policy)
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 256)
    monkeypatch.setattr(model_of, "HEAD_COLUMNS", 256)
    return policy


def lora(rank: int) -> LoraSettings:
    return LoraSettings(rank=rank, alpha=2 * rank, target_modules=tiny_models.TARGETS)


def _response_tokens(policy: LoadedPolicy) -> int:
    text = response_text(policy.processor, RESPONSE)
    return len(policy.processor.tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    ("checkpointing", "rank", "samples"),
    # The states of AdamW exist from the second step on; those of rank 8 do not matter.
    [(True, 64, 4), (False, 8, 1)],
)
def test_a_step_of_dpo(
    unloaded: LoadedPolicy,
    base: ModelConfig,
    tmp_path: Path,
    checkpointing: bool,
    rank: int,
    samples: int,
) -> None:
    config = DpoConfig(
        learning_rate=1e-4,
        batch_size=1,
        gradient_accumulation_steps=2 if samples > 1 else 1,
        gradient_checkpointing=checkpointing,
        lora=lora(rank),
    )
    examples = [
        PreferenceExample(tiny_models.QUESTION, RESPONSE, RESPONSE[28:], image)
        for _ in range(samples)
    ]
    overrides = [
        "dpo.batch_size=1",
        f"dpo.gradient_checkpointing={str(checkpointing).lower()}",
        f"dpo.lora.rank={rank}",
    ]
    wanted = predicted(unloaded, "train-dpo", _response_tokens(unloaded), overrides)
    found = measured(lambda: train_dpo(Policy(base=base), examples, config, tmp_path, seed=0))
    assert found == pytest.approx(wanted, rel=TOLERANCE)


def test_a_step_of_stage_1(unloaded: LoadedPolicy, base: ModelConfig, tmp_path: Path) -> None:
    config = RationaleTuningConfig(learning_rate=1e-4, lora=lora(8), samples=2, batch_size=2)
    examples = [
        RationaleExample(tiny_models.QUESTION, RESPONSE[start:], image) for start in (0, 28)
    ]
    overrides = ["rationale.batch_size=2", "rationale.lora.rank=8"]
    wanted = predicted(unloaded, "tune-rationale", _response_tokens(unloaded), overrides)
    found = measured(lambda: tune_rationale(Policy(base=base), examples, config, tmp_path, seed=0))
    assert found == pytest.approx(wanted, rel=TOLERANCE)
