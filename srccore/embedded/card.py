"""Measures the embedded models and writes their cards: ``python -m srccore.embedded cards``."""

from __future__ import annotations

import math
import random
from functools import partial

from PIL.Image import Image

from srccore.data.records import LabelledPair
from srccore.embedded import flaws
from srccore.embedded.model import MODELS
from srccore.embedded.world import Item, make_item
from srccore.method import evaluation, scoring
from srccore.method.driver import Search, drive
from srccore.method.engine import Prompt
from srccore.models.teacher import FactsTeacher, PairRequest

__all__ = ["write_cards"]

COUNT = 600
"""How many items of the held-out split to measure on."""
HEAD = """---
license: apache-2.0
library_name: transformers
---

# {title}

{what}

Made by `{command}` (seed 0; the defaults of that command are the steps). Data: the pretraining
split of the embedded little world (emoji art, gapminder, handwritten digits; sources and licences
in the package's NOTICE), which shares no instance with the splits that a run uses.

## Measured on {count} items of the held-out split

{figures}
"""
LVLM = (
    "A LLaVA of {parameters:.1f} million parameters (CLIP tower 4 x 128, Llama 4 x 128, images of "
    "72 pixels) that knows only its little world. **Its rationales are flawed on purpose**: a "
    "step is often left out, a few misconceptions are fixed, some conclusions do not follow. It "
    "exists to run the machinery of Self-Rationale Calibration on a laptop; what it gains says "
    "nothing about a real model."
)
RATING = (
    "A Qwen2 of {parameters:.1f} million parameters that compares two texts about the little "
    "world, in the place that Qwen2.5-1.5B has in the paper: the base from which R-Scorer is "
    "tuned. It reads the rating tokens 1 to 5 behind the prompt."
)


def write_cards() -> None:
    """Writes ``README.md`` beside both checkpoints."""
    items = [make_item(0, "heldout", number) for number in range(COUNT)]
    _write(
        "lvlm",
        title="The embedded vision-language model",
        command="python -m srccore.embedded pretrain",
        what=LVLM,
        figures=_lvlm_figures(items),
    )
    _write(
        "rating",
        title="The embedded rating model",
        command="python -m srccore.embedded pretrain-rating",
        what=RATING,
        figures=_rating_figures(items),
    )


def _write(name: str, *, what: str, **fields: object) -> None:
    from safetensors import safe_open

    folder = MODELS / name
    with safe_open(folder / "model.safetensors", "pt") as weights:
        shapes = [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118
    parameters = sum(math.prod(shape) for shape in shapes)
    text = HEAD.format(what=what.format(parameters=parameters / 1e6), count=COUNT, **fields)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _lvlm_figures(items: list[Item]) -> str:
    from srccore.config import ModelConfig
    from srccore.models.policy import Policy, load_policy
    from srccore.models.transformers import TransformersSamplingEngine

    loaded = load_policy(Policy(base=ModelConfig(path="embedded:lvlm")))
    engine = TransformersSamplingEngine(loaded.model, loaded.processor)
    rows = [
        "| asked | parses | answer right | answer and rationale right |",
        "| --- | --- | --- | --- |",
    ]
    for title, suffix in (("the question", ""), ("the question and `Explain.`", " Explain.")):
        searches = [
            Search(
                Prompt(partial(_image, item), item.sample.question + suffix, item.sample.id),
                partial(evaluation.answer, sample_id=item.sample.id, max_tokens=80),
            )
            for item in items
        ]
        responses = {each.sample_id: each for found in drive(engine, [searches]) for each in found}
        outcomes = evaluation.judge_responses([item.sample for item in items], responses)
        found_figures = evaluation.figures(outcomes, round=0, previous=None, resamples=100, seed=0)
        rows.append(
            f"| {title} | {found_figures.format_rate:.1%} | {found_figures.accuracy:.1%} "
            f"| {found_figures.aligned_accuracy:.1%} |"
        )
    return "\n".join([*rows, "\nGreedy."])


def _image(item: Item) -> Image:
    return item.image


def _rating_figures(items: list[Item]) -> str:
    from srccore.models.rating import TransformersRatingEngine

    rng = random.Random(0)
    engine = TransformersRatingEngine.load(MODELS / "rating", "cpu", 8192)
    pairs = []
    for item in items:
        first, second = (flaws.flawed_response(item, rng) for _ in range(2))
        ((_, rating, _),) = FactsTeacher().ratings([PairRequest(item.sample, first, second)])
        assert rating is not None
        pairs.append(
            LabelledPair(sample_id=item.sample.id, first=first, second=second, rating=rating)
        )
    health = scoring.validate(engine, {item.sample.id: item.sample for item in items}, pairs)
    rows = ["| figure | value |", "| --- | --- |"]
    rows += [
        f"| {name.replace('_', ' ')} | {value:.3f} |"
        for name, value in health.items()
        if isinstance(value, float)
    ]
    return "\n".join([*rows, "\nPairs of responses written as the wild writes, both orders."])
