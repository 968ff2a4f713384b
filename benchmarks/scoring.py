"""Scoring and R-Scorer's training against what is usual, on a CPU.

    python benchmarks/scoring.py                 # 10 minutes on one busy core
    python benchmarks/scoring.py --part tiny --part training --samples 4

Two scorers rate pairs: the one of preset ``tiny``, and a random one of 41 M weights (`wide`).
The candidates are those that a search finds with the preset's model. Times are CPU time of one
thread, which other work on the machine hardly changes. What is compared must be equal: the
benchmark stops if ratings differ by 1e-5, or losses by 1e-4.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import padded_training
from peers.pair_scoring import generate_and_parse, read_whole_prompts
from timing import Timing, alternate, arguments, report

from srccore.config import ModelConfig, ScorerConfig, TextModelConfig, load_config
from srccore.data.records import RATING_LEVELS
from srccore.embedded.world import make_item
from srccore.method import scoring, search
from srccore.method.driver import Search, drive
from srccore.method.engine import Prompt
from srccore.models.packing import batches, pack
from srccore.models.policy import Policy, load_policy, resolve_model_path
from srccore.models.rating import TransformersRatingEngine, encode_rating_prompts, single_token
from srccore.models.transformers import TransformersSamplingEngine
from srccore.training.machine import Machine
from srccore.training.scorer import RatingExample, train_scorer

BATCH = {"tiny": 128, "wide": 32}
"""Prompts of a forward pass of the peers."""
TRAINED = 32
"""Examples of an optimiser step, as in preset ``tiny``."""
STEPS = 4
"""Timed optimiser steps; one before them is not."""


def searched_prompts(samples: int) -> list[str]:
    """Returns the prompts of all pairs of some samples, as `score-candidates` asks them."""
    policy = load_policy(Policy(base=ModelConfig(path="embedded:lvlm")))
    engine = TransformersSamplingEngine(policy.model, policy.processor)
    items = [make_item(0, "calibration", number) for number in range(samples)]
    config = load_config("tiny").search
    searches = [
        Search(
            # The pretrained model only reasons where it is asked to.
            Prompt(
                lambda item=item: item.image, f"{item.sample.question} Explain.", item.sample.id
            ),
            partial(search.search, sample_id=item.sample.id, config=config, seed=0, round_number=1),
        )
        for item in items
    ]
    sets = [each for found in drive(engine, [searches]) for each in found]
    return [
        scoring.rating_prompt(item.sample, first.text, second.text)
        for item, found in zip(items, sets, strict=True)
        for first, second in scoring.pair_schedule(item.sample, found.candidates)
    ]


def scorer(kind: str) -> tuple[Any, Any]:
    """Loads the scorer of ``tiny``, or makes a wide one with the same tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    path = resolve_model_path("embedded:rating")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if kind == "tiny":
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), tokenizer
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config), tokenizer


def compare_scoring(
    kind: str, prompts: list[str], repetitions: int
) -> tuple[dict[str, Timing], dict[str, object]]:
    """Times the ways to rate some prompts, after checking that they agree."""
    model, tokenizer = scorer(kind)
    model.eval()
    levels = [str(level) for level in RATING_LEVELS]
    ids = [single_token(tokenizer, level) for level in levels]
    tokens = load_config("tiny").scoring.batch_tokens
    # A model of its own, because packing changes its attention for good.
    engine = TransformersRatingEngine(copy.deepcopy(model), tokenizer, tokens)

    wanted = read_whole_prompts(model, tokenizer, prompts, ids, BATCH[kind])
    found = engine.next_token_distribution(prompts, levels)
    difference = max(
        abs(one - other)
        for row, each in zip(wanted, found, strict=True)
        for one, other in zip(row, each.probabilities, strict=True)
    )
    if difference > 1e-5:
        raise AssertionError(f"The ratings of the {kind} scorer differ by {difference}.")
    encoded = encode_rating_prompts(tokenizer, prompts)
    rows = [pack([encoded[number] for number in batch]) for batch in batches(encoded, tokens)]
    timings = alternate(
        {
            "whole prompts, padded": lambda: read_whole_prompts(
                model, tokenizer, prompts, ids, BATCH[kind]
            ),
            "generate and parse": lambda: generate_and_parse(
                model, tokenizer, prompts, BATCH[kind]
            ),
            "srccore": lambda: engine.next_token_distribution(prompts, levels),
        },
        repetitions,
        time.process_time,
    )
    return timings, {
        f"{kind}: pairs": len(prompts),
        f"{kind}: tokens of the whole prompts": sum(map(len, encoded)),
        f"{kind}: tokens that srccore computes": sum(row["input_ids"].shape[1] for row in rows),
        f"{kind}: greatest difference of a probability": difference,
    }


def compare_training(
    prompts: list[str], repetitions: int
) -> tuple[dict[str, Timing], dict[str, object]]:
    """Times optimiser steps of the scorer of ``tiny``, after checking that losses agree."""
    count = TRAINED * (STEPS + 1)
    repeated = [prompts[(7 * number) % len(prompts)] for number in range(count)]
    examples = [RatingExample(each, 1 + number % 5) for number, each in enumerate(repeated)]
    base = TextModelConfig(path="embedded:rating")
    config = ScorerConfig(learning_rate=1e-3, batch_size=TRAINED, checkpoint_minutes=0)

    def steps(train: Callable[..., Any]) -> tuple[float, Any]:
        ends: list[float] = []
        machine = Machine(progress=lambda *_: ends.append(time.process_time()))
        with tempfile.TemporaryDirectory() as out:
            outcome = train(base, examples, config, Path(out), seed=0, machine=machine)
        return ends[-1] - ends[0], outcome

    theirs, ours = steps(padded_training.train)[1], steps(train_scorer)[1].training
    difference = max(abs(theirs[0] - ours.first_loss), abs(theirs[-1] - ours.last_loss))
    if difference > 1e-4:
        raise AssertionError(f"The losses of the trainings differ by {difference}.")
    timings = alternate(
        {
            "plain TRL, padded": lambda: steps(padded_training.train)[0],
            "srccore": lambda: steps(train_scorer)[0],
        },
        repetitions,
    )
    return timings, {
        "training: seconds are for steps of 32 examples": STEPS,
        "training: greatest difference of the first and last loss": difference,
    }


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser()
    parts = ["tiny", "wide", "training"]
    parser.add_argument("--part", action="append", choices=parts, help="by default, all")
    parser.add_argument("--samples", type=int, default=12, help="whose pairs are rated")
    given = arguments(__doc__, parser)
    torch.set_num_threads(1)
    prompts = searched_prompts(given.samples)
    results: dict[str, dict[str, Timing]] = {}
    notes: dict[str, object] = {}
    for part in given.part or parts:
        if part == "training":
            timings, counted = compare_training(prompts, given.repetitions)
        else:
            # The wide one takes fifteen times as long for a pair.
            some = prompts if part == "tiny" else prompts[: len(prompts) // 6]
            timings, counted = compare_scoring(part, some, given.repetitions)
        title = "training R-Scorer" if part == "training" else f"scoring, {part}"
        results[title] = timings
        notes |= counted
    report(results, given.json, notes)


if __name__ == "__main__":
    main()
