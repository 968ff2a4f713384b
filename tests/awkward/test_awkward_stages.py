"""Every stage runs on every awkward checkpoint, and search and evaluation say what was trained."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

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
    Response,
    Sample,
    read_records,
    write_records,
)
from srccore.models.families import image_tokens
from srccore.models.policy import load_policy, load_processor, prompt_text, read_policy
from srccore.stages.candidates import sample_responses, score_candidates, search_candidates
from srccore.stages.evaluation import evaluate
from srccore.stages.folder import StageFolder
from srccore.stages.preferences import curate_preference, train_dpo
from srccore.stages.rationales import tune_rationale
from srccore.stages.scorer import train_scorer
from srccore.training.checkpoints import export_merged

RATIONALE = tiny_models.RESPONSE.partition("\n")[0]
WORSE = "The red bar is four high.\nAnswer: 4"
LORA = LoraSettings(rank=16, alpha=32)
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
        CurationConfig(min_margin=0.0, anchor_tolerance=None),
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


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_stage_runs_and_what_was_trained_is_said(
    awkward: Callable[[str], ModelConfig],
    name: str,
    data: Path,
    preferences: Path,
    tmp_path: Path,
) -> None:
    tuned = tune_rationale(
        RationaleTuningConfig(
            samples=8,
            learning_rate=2e-2,
            batch_size=4,
            epochs=20,
            lora=LORA,
            checkpoint_minutes=0,
            min_format_rate=0,
        ),
        model=awkward(name),
        data=data,
        out=tmp_path / "tuned",
        seed=0,
    )
    assert (tuned["samples"], tuned["skipped"]) == (8, 0)
    policy = tmp_path / "tuned"
    search = SearchConfig(samples=8, width=2, branch=1, candidates=2, max_sentence_tokens=40)
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
        DpoConfig(learning_rate=5e-3, batch_size=2, lora=LoraSettings(rank=2, alpha=4)),
        data=data,
        preferences=preferences,
        policy=policy,
        out=tmp_path / "aligned",
        seed=0,
    )
    assert aligned["training"]["samples"] == 8
    figures = evaluate(
        EvaluationConfig(max_tokens=60, resamples=100),
        data=data,
        policy=tmp_path / "aligned",
        out=tmp_path / "evaluated",
        seed=0,
        round_number=1,
    )
    assert figures["accuracy"] == 1
    said = read_records(tmp_path / "evaluated" / "responses.jsonl", Response)
    assert {record.text for record in said} == {tiny_models.RESPONSE}

    trained = read_policy(tmp_path / "aligned")
    export_merged(trained, tmp_path / "merged", "# A policy\n")
    own = load_policy(trained)
    merged = load_policy(
        read_policy(tmp_path / "aligned").model_copy(
            update={
                "base": ModelConfig(path=str(tmp_path / "merged"), dtype=trained.base.dtype),
                "adapters": (),
            }
        )
    )
    assert merged.processor.chat_template == own.processor.chat_template
    assert torch.equal(
        tiny_models.logits(merged.model, merged.processor),
        tiny_models.logits(own.model, own.processor),
    )


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
