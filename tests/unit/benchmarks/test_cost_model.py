"""The cost model against hand calculations and against what was measured on GPUs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from srccore.config import load_config

BENCHMARKS = str(Path(__file__).parents[3] / "benchmarks")
LLAVA = "llava-hf/llava-1.5-7b-hf"
SCORER = "Qwen/Qwen2.5-1.5B"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import cost_model

    yield cost_model
    for name in ("cost_model", "memory_model"):
        sys.modules.pop(name, None)


def _jobs(model: ModuleType, **texts: int) -> dict:
    config = load_config("llava-1.5-7b")
    shapes = (model.SHAPES[LLAVA], model.SHAPES[SCORER])
    return {job.stage: job for job in model.jobs(config, *shapes, model.Texts(**texts))}


def test_work_follows_from_the_preset(model: ModuleType) -> None:
    jobs = _jobs(model, question=64, response=100, rating=200)
    # 3 rounds of 12,000 samples; 576 + 64 tokens of prompt; 4 * 3 draws.
    search = jobs["search-candidates"].work
    assert search.image_encodings == search.prompts == 36_000
    assert search.prefilled_tokens == 36_000 * 640
    assert search.decoded_tokens == 36_000 * 12 * 100
    # Batches of 9, since 10 x 640 tokens are more than 6144: a pass for the prompts of each, and
    # one per token of the longest row.
    assert search.forward_passes == 4_000 * (1 + 100)
    # 5 candidates: 20 + 10 pairs.
    scoring = jobs["score-candidates"].work
    assert scoring.prompts == 36_000 * 30
    assert scoring.prefilled_tokens == 36_000 * (200 + 6 * 100 + 30 * 100)
    assert jobs["train-dpo"].work.prefilled_tokens == 36_000 * (640 + 2 * 100)
    # The gradient of activations, checkpointing, and the reference.
    assert jobs["train-dpo"].passes == 4
    assert jobs["tune-rationale"].passes == 3


def test_a_decoding_step_waits_for_the_slowest_part(model: ModuleType) -> None:
    shape = model.SHAPES[LLAVA]
    card = model.GPUS["h100"]
    few = model.step_seconds(shape, card, 8, 700, 2, "transformers")
    assert few == pytest.approx(53 * 32 * 17e-6)
    # 6.6e9 weights of 2 bytes and 8 caches of 700 tokens, 0.5 MB each, at 0.7 * 3.35 TB/s.
    assert model.step_seconds(shape, card, 8, 700, 2, "vllm") == pytest.approx(
        (2 * 6.6e9 + 8 * 700 * 2 * 32 * 4096 * 2) / (0.7 * 3.35e12), rel=0.01
    )
    many = model.step_seconds(shape, card, 512, 700, 2, "transformers")
    assert many > 2 * few


@pytest.mark.parametrize(
    ("checkpoint", "gpu", "images", "prompt", "measured"),
    [
        # RESULTS.md: tokens of prompts per second.
        (LLAVA, "h100", 64, 626, 22_600),
        ("llava-hf/llama3-llava-next-8b-hf", "h200", 32, 2654, 20_911),
    ],
)
def test_prompts_take_what_was_measured(
    model: ModuleType, checkpoint: str, gpu: str, images: int, prompt: int, measured: float
) -> None:
    work = model.Work(
        prompts=images, image_encodings=images, prefilled_tokens=images * prompt, forward_passes=1
    )
    job = model.Job("evaluate", model.SHAPES[checkpoint], work)
    found = model.seconds(job, model.GPUS[gpu])["prompts"]
    assert images * prompt / found == pytest.approx(measured, rel=0.15)


def test_the_table_has_every_stage_that_needs_a_gpu(model: ModuleType) -> None:
    text = model.table(load_config("llava-1.5-7b"), "a100", "vllm")
    stages = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if "M |" in line]
    assert stages == [
        "tune-rationale",
        "sample-responses",
        "train-scorer",
        "search-candidates",
        "score-candidates",
        "train-dpo",
        "evaluate",
    ]
