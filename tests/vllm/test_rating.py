"""R-Scorer through vLLM rates as it does through transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from srccore.config import EngineConfig, load_config
from srccore.errors import UserError
from srccore.models.policy import resolve_model_path
from srccore.models.rating import TransformersRatingEngine, encode_rating_prompts
from srccore.models.vllm import VllmRatingEngine

pytestmark = pytest.mark.vllm
LEVELS = [str(level) for level in range(1, 6)]
HEAD = "Question: How high is the red bar? Reference: The red bar is three high. "
PROMPTS = [
    f"{HEAD}First: The red bar is {first} high. Second: The red bar is {second} high."
    for first in ("three", "four", "not three")
    for second in ("3", "five", "very very very high, as everyone can see, and then some")
]


def test_distributions_are_those_of_transformers() -> None:
    folder = Path(resolve_model_path(load_config("tiny").rating_model.path))
    engine = VllmRatingEngine(folder, "cpu", EngineConfig(name="vllm", max_length=200))
    plain = TransformersRatingEngine.load(folder, "cpu", batch_tokens=512)
    for _ in range(2):  # Once more, from the prefix cache.
        found = engine.next_token_distribution(PROMPTS, LEVELS)
        wanted = plain.next_token_distribution(PROMPTS, LEVELS)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-5)
            assert ours.mass == pytest.approx(theirs.mass, abs=1e-5)
    assert engine.work.prompts == 2 * len(PROMPTS)
    # Most of the second time is in the cache.
    length = len(encode_rating_prompts(plain._tokenizer, PROMPTS[:1])[0])
    assert engine.work.prefilled_tokens < 1.5 * len(PROMPTS) * length
    with pytest.raises(UserError, match=r"engine\.max_length"):
        engine.next_token_distribution([*PROMPTS[:1], HEAD * 50], LEVELS)
    # What was accepted before it does not come back as another's.
    (again,) = engine.next_token_distribution(PROMPTS[:1], LEVELS)
    assert again.probabilities == pytest.approx(wanted[0].probabilities, abs=1e-5)
