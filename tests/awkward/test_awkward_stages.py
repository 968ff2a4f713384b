"""Every stage runs on every awkward checkpoint, and training sees what inference sees."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from awkward.checkpoints import CHECKPOINTS, SHAPES

from srccore.config import (
    AnnotationConfig,
    CurationConfig,
    DpoConfig,
    EvaluationConfig,
    LoraSettings,
    ModelConfig,
    RationaleTuningConfig,
    ScorerConfig,
    ScoringConfig,
    SearchConfig,
    TextModelConfig,
)
from srccore.data.dataset import open_data, write_data
from srccore.data.records import (
    Candidate,
    CandidateSet,
    Category,
    LabelledPair,
    Preference,
    Sample,
    read_records,
    write_records,
)
from srccore.models.families import image_tokens
from srccore.models.policy import (
    Policy,
    load_policy,
    load_processor,
    prompt_text,
    read_policy,
    response_text,
)
from srccore.models.transformers import encode_prompts
from srccore.stages.candidates import sample_responses, score_candidates, search_candidates
from srccore.stages.evaluation import evaluate
from srccore.stages.folder import StageFolder
from srccore.stages.preferences import curate_preference, train_dpo
from srccore.stages.rationales import tune_rationale
from srccore.stages.scorer import train_scorer
from srccore.training.checkpoints import export_merged
from srccore.training.dpo import PreferenceExample
from srccore.training.dpo import train_dpo as align
from srccore.training.rationale import RationaleExample
from srccore.training.rationale import tune_rationale as tune
from srccore.training.shared_prompt import Collator

RATIONALE = tiny_models.RESPONSE.partition("\n")[0]
WORSE = "The red bar is four high.\nAnswer: 4"
LORA = LoraSettings(rank=4, alpha=8)
SAMPLES = [
    Sample(
        id=f"s{number}",
        category=Category.CHART,
        question=f"<image>\n{tiny_models.QUESTION}",
        answer="3",
        rationale=RATIONALE,
    )
    for number in range(2 * len(SHAPES))
]

# One of each family, and the quirk that most changes what a stage sees; the rest are long.
SHORT = ("padded-vocabulary", "llava-next-shapes", "qwen2.5-vl", "smolvlm", "internvl")
SOME_IN_MAKE_TEST = [
    pytest.param(name, marks=[] if name in SHORT else pytest.mark.long) for name in CHECKPOINTS
]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two samples per shape of image, all with the same question and reference."""
    path = tmp_path_factory.mktemp("data") / "data.parquet"
    rows = []
    for sample, shape in zip(SAMPLES, 2 * SHAPES, strict=True):
        file = io.BytesIO()
        tiny_models.image(*shape).save(file, "PNG")
        rows.append((sample, file.getvalue()))
    write_data(path, rows)
    return path


@pytest.fixture(scope="session")
def candidates(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two candidates per sample, one of which has the right answer, as the search writes them."""
    out = tmp_path_factory.mktemp("candidates")
    sets = [
        CandidateSet(sample_id=sample.id, candidates=(_candidate("a"), _candidate("b", WORSE)))
        for sample in SAMPLES
    ]
    folder = StageFolder("search-candidates", out, inputs={"data": data})
    write_records(out / "candidates.jsonl", CandidateSet, sets)
    folder.finish({})
    return out


def _candidate(name: str, text: str = tiny_models.RESPONSE) -> Candidate:
    return Candidate(id=name, text=text, log_probability=-10.0, token_count=20)


@pytest.fixture(scope="session")
def preferences(data: Path, candidates: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What score-candidates and curate-preference make of the candidates, with a small R-Scorer."""
    root = tmp_path_factory.mktemp("text")
    pairs = root / "pairs"
    labelled = StageFolder("annotate-ratings", pairs, inputs={"data": data})
    rated = [
        LabelledPair(sample_id=sample.id, first=tiny_models.RESPONSE, second=WORSE, rating=5)
        for sample in SAMPLES
    ]
    write_records(pairs / "labelled_pairs.jsonl", LabelledPair, rated)
    labelled.finish({})
    train_scorer(
        ScorerConfig(learning_rate=1e-3, batch_size=2, epochs=8),
        model=TextModelConfig(path="embedded:rating"),
        data=data,
        annotation=AnnotationConfig(samples=8, validation_share=0.4),
        labelled_pairs=pairs,
        out=root / "scorer",
        seed=0,
    )
    score_candidates(
        ScoringConfig(),
        data=data,
        candidates=candidates,
        scorer=root / "scorer",
        out=root / "ratings",
    )
    curate_preference(
        CurationConfig(min_margin=0.0, anchor_tolerance=1),
        data=data,
        candidates=[candidates],
        ratings=[root / "ratings"],
        out=root / "preferences",
    )
    return root / "preferences"


def test_curation_prefers_the_right_answer(preferences: Path) -> None:
    found = list(read_records(preferences / "preferences.jsonl", Preference))
    assert {record.sample_id for record in found} == {sample.id for sample in SAMPLES}
    assert {record.chosen.text for record in found} == {tiny_models.RESPONSE}


@pytest.mark.parametrize("name", SOME_IN_MAKE_TEST)
def test_every_stage_runs(
    awkward: Callable[[str], ModelConfig],
    name: str,
    data: Path,
    preferences: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # An untrained model rarely ends a response.
    monkeypatch.setattr("srccore.stages.format_check.MAX_TOKENS", 8)
    policy = tmp_path / "tuned"
    tuned = tune_rationale(
        RationaleTuningConfig(
            samples=8,
            learning_rate=1e-2,
            batch_size=4,
            epochs=2,
            lora=LORA,
            min_format_rate=0,
        ),
        model=awkward(name),
        data=data,
        out=policy,
        seed=0,
    )
    assert (tuned["samples"], tuned["skipped"], tuned["steps"]) == (8, 0, 4)
    # All samples have the same response.
    assert tuned["last_loss"] < tuned["first_loss"]
    search = SearchConfig(
        samples=8, width=2, branch=1, candidates=2, max_sentences=2, max_sentence_tokens=6
    )
    sampled = sample_responses(
        search,
        annotation=AnnotationConfig(samples=8, candidates=2),
        data=data,
        policy=policy,
        out=tmp_path / "sampled",
        seed=0,
    )
    found = search_candidates(
        search, data=data, policy=policy, out=tmp_path / "found", seed=0, round_number=1
    )
    assert (sampled["samples"], found["samples"]) == (8, 8)
    aligned = train_dpo(
        DpoConfig(learning_rate=1e-2, batch_size=4, epochs=2, lora=LORA),
        data=data,
        preferences=preferences,
        policy=policy,
        out=tmp_path / "aligned",
        seed=0,
    )
    assert (aligned["training"]["samples"], aligned["training"]["skipped"]) == (8, 0)
    assert aligned["training"]["last_loss"] < aligned["training"]["first_loss"]
    assert aligned["folding"]["projection"] == pytest.approx(1, abs=0.1)
    figures = evaluate(
        EvaluationConfig(max_tokens=12, resamples=100),
        data=data,
        policy=tmp_path / "aligned",
        out=tmp_path / "evaluated",
        seed=0,
        round_number=1,
    )
    assert figures["n"] == 8

    trained = read_policy(tmp_path / "aligned")
    export_merged(trained, tmp_path / "merged", "# A policy\n")
    own = load_policy(trained)
    base = ModelConfig(path=str(tmp_path / "merged"), dtype=trained.base.dtype)
    merged = load_policy(Policy(base=base))
    assert merged.processor.chat_template == own.processor.chat_template
    assert torch.equal(
        tiny_models.logits(merged.model, merged.processor),
        tiny_models.logits(own.model, own.processor),
    )


class SeenError(Exception):
    """Carries the first batch that a model was to be trained on."""


@pytest.mark.parametrize("name", SOME_IN_MAKE_TEST)
@pytest.mark.parametrize("training", ["rationale", "dpo"])
def test_training_sees_the_tokens_and_pixels_of_inference(
    awkward: Callable[[str], ModelConfig],
    training: str,
    name: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Collator.__call__

    def call(this: Collator, samples: list[dict[str, Any]]) -> None:
        raise SeenError(original(this, samples))

    monkeypatch.setattr(Collator, "__call__", call)
    opened = open_data(data)
    policy = Policy(base=awkward(name))
    chosen, sample = tiny_models.RESPONSE, SAMPLES[1]
    image = functools.partial(opened.image, sample.id)
    settings = {"learning_rate": 1e-3, "batch_size": 1, "lora": LORA}
    with pytest.raises(SeenError) as caught:
        if training == "rationale":
            examples = [RationaleExample(sample.question, chosen, image)]
            tuning = RationaleTuningConfig(samples=1, **settings)
            tune(policy, examples, tuning, tmp_path, seed=0)
        else:
            pair = [PreferenceExample(sample.question, chosen, WORSE, image)]
            align(policy, pair, DpoConfig(**settings), tmp_path, seed=0)
    (batch,) = caught.value.args

    processor = load_processor(policy.base)
    asked = encode_prompts(processor, [tiny_models.prompt(image(), sample.question)])
    said = processor.tokenizer.encode(response_text(processor, chosen), add_special_tokens=False)
    row = [*asked["input_ids"][0].tolist(), *said]
    assert batch["row_ids"][0, : len(row)].tolist() == row
    # The image is there once, whatever the number of responses.
    pixels = asked["pixel_values"]
    assert torch.equal(batch["pixel_values"], pixels)
    others = set(asked) - {"input_ids", "attention_mask", "pixel_values", "mm_token_type_ids"}
    assert all(torch.equal(batch[each], asked[each]) for each in others)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_image_tokens_are_counted_without_the_image(
    awkward: Callable[[str], ModelConfig], name: str, data: Path
) -> None:
    processor = load_processor(awkward(name))
    text = prompt_text(processor, tiny_models.QUESTION)
    alone = len(processor.tokenizer.encode(text, add_special_tokens=False))
    opened = open_data(data)
    for sample in SAMPLES:
        seen = processor(images=[[opened.image(sample.id)]], text=[text], add_special_tokens=False)[
            "input_ids"
        ]
        counted = image_tokens(processor, opened.size(sample.id))
        assert alone - 1 + counted == len(seen[0])
