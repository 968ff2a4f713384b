"""Makes the base of R-Scorer for preset `tiny`: ``python -m srccore.embedded pretrain-rating``.

The paper starts R-Scorer from Qwen2.5-1.5B, which can compare two texts before it is tuned. This
model takes its place: a Qwen2 of 0.9 M parameters that learned to compare texts of the pretraining
split. A rating is one token in two hundred, too weak a signal to learn to read from. So the model
also learns the prompt as language, and since responses mostly repeat the facts of their prompt, it
learns to look up in the facts what a response says. A second head, discarded afterwards, predicts
after every sentence of the responses whether the facts support it, from the layer before the last.
A run then tunes the model on the responses of its stage-1 policy.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from srccore.embedded import flaws
from srccore.embedded.model import (
    LAYERS,
    MODELS,
    PAD,
    RATING_TEMPLATE,
    WIDTH,
    build_rating_model,
)
from srccore.embedded.world import Item, make_item, world_facts
from srccore.method import response, scoring, sentences
from srccore.method.facts import Verdict, check_rationale
from srccore.models.teacher import FactsTeacher, PairRequest

__all__ = ["pretrain_rating"]

BATCH = 32
GOLD = 0.2
"""Share of the responses that are entirely right."""
MISSEEN = 0.5
"""Share of the responses that misread the image somewhere, as a policy may misread anything."""
SLIP = 0.15
"""How often, in addition, a sentence is changed, left out or repeated."""


@dataclass(frozen=True)
class _Row:
    """A rated pair as token ids, with the targets of the second head."""

    ids: list[int]
    rating: int
    """The token after the prompt."""
    places: list[int]
    """Indices of the tokens that end a sentence or an answer."""
    verdicts: list[int]
    """For each place: 1 if the sentence is supported or the answer is right, else 0."""


def pretrain_rating(out: Path, *, seed: int, items: int, steps: int) -> None:
    """Trains the rating model from scratch and saves it in Hugging Face layout (float16).

    Args:
        out: The folder to write.
        seed: The seed of data, order and initial weights.
        items: How many items of the pretraining split to make and draw from.
        steps: Optimiser steps, with `BATCH` pairs each.
    """
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    rng = random.Random(seed + 2)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "lvlm")
    tokenizer.chat_template = RATING_TEMPLATE
    model = build_rating_model()
    judge = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2))
    weights = [*model.parameters(), *judge.parameters()]
    world = [make_item(seed, "pretrain", number) for number in range(items)]
    optimizer = torch.optim.AdamW(weights, 1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps + 1, pct_start=0.1
    )
    began = time.monotonic()
    losses, right, judged = [], [], []
    for step in range(1, steps + 1):
        rows = [_row(rng.choice(world), tokenizer, rng) for _ in range(BATCH)]
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(row.ids) for row in rows], batch_first=True, padding_value=PAD
        )
        output = model.model(
            input_ids=ids, attention_mask=(ids != PAD).long(), output_hidden_states=True
        )
        every = model.lm_head(output.last_hidden_state)
        language_loss = nn.functional.cross_entropy(
            every[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD
        )
        logits = every[range(len(rows)), [len(row.ids) - 1 for row in rows]]
        ratings = torch.tensor([row.rating for row in rows])
        which = [number for number, row in enumerate(rows) for _ in row.places]
        places = [place for row in rows for place in row.places]
        said = judge(output.hidden_states[LAYERS - 1][which, places])
        verdicts = torch.tensor([verdict for row in rows for verdict in row.verdicts])
        rating_loss = nn.functional.cross_entropy(logits, ratings)
        loss = rating_loss + nn.functional.cross_entropy(said, verdicts) + language_loss
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(rating_loss.item())
        right.append((logits.argmax(-1) == ratings).float().mean().item())
        judged.append((said.argmax(-1) == verdicts).float().mean().item())
        if step % 100 == 0:
            rate = (time.monotonic() - began) / step
            print(
                f"rating {step}/{steps}: loss {np.mean(losses[-100:]):.4f}, "
                f"right {np.mean(right[-100:]):.3f}, "
                f"sentences judged correctly {np.mean(judged[-100:]):.3f}, {rate:.2f} s/step"
            )
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)


def _row(item: Item, tokenizer: Any, rng: random.Random) -> _Row:
    """Makes a pair of responses to an item, rated by the facts."""
    first, second = (_response(item, rng) for _ in range(2))
    ((_, rating, _),) = FactsTeacher().ratings([PairRequest(item.sample, first, second)])
    prompt = scoring.rating_prompt(item.sample, first, second)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # The labels of `rating_prompt` start their lines, and a response is on one line.
    ends: dict[int, int] = {}
    for label, answered in (("\nFirst: ", first), ("\nSecond: ", second)):
        place = text.index(label) + len(label)
        for sentence, verdict in _verdicts(item, answered):
            place = text.index(sentence, place) + len(sentence)
            ends[place] = verdict
    places = {
        number: ends[end]
        for number, (start, end) in enumerate(encoded["offset_mapping"])
        if end in ends and end > start
    }
    (token,) = tokenizer.encode(str(rating), add_special_tokens=False)
    return _Row(encoded["input_ids"], token, list(places), list(places.values()))


def _response(item: Item, rng: random.Random) -> str:
    kind = rng.random()
    if kind < GOLD:
        text = response.write(item.sample.rationale or "", item.sample.answer)
    elif kind < GOLD + MISSEEN:
        text = flaws.flawed_response(replace(item, seen=_misseen(item, rng)), rng)
    else:
        text = flaws.flawed_response(item, rng)
    return _slip(text, rng) if rng.random() < SLIP else text


def _misseen(item: Item, rng: random.Random) -> dict[str, str]:
    """Changes one or two of the values that are seen, or swaps two of them."""
    seen = dict(item.seen)
    places = list(seen)
    if len(places) > 1 and rng.random() < 0.25:
        one, other = rng.sample(places, 2)
        return seen | {one: seen[other], other: seen[one]}
    names = {
        relation: sorted(key.split(" of ")[1] for key in world_facts() if key.startswith(relation))
        for relation in ("capital of ", "kind of ")
    }
    for place in rng.sample(places, min(len(places), rng.choice((1, 1, 2)))):
        if seen[place] in names["capital of "]:
            pool = names["capital of "]
        elif seen[place] in names["kind of "]:
            pool = names["kind of "]
        else:
            pool = [str(number) for number in range(10)]
        # As in the world itself, no two are the same.
        seen[place] = rng.choice([name for name in pool if name not in seen.values()])
    return seen


def _slip(text: str, rng: random.Random) -> str:
    """Changes a number, leaves a sentence out, or says one twice."""
    parsed = response.parse(text)
    assert parsed is not None, text
    steps = sentences.split(parsed.rationale)
    number = rng.randrange(len(steps))
    kind = rng.choice(("change", "omit", "repeat"))
    digits = [place for place, letter in enumerate(steps[number]) if letter.isdigit()]
    if kind == "change" and digits:
        place = rng.choice(digits)
        changed = rng.choice([d for d in "0123456789" if d != steps[number][place]])
        steps[number] = steps[number][:place] + changed + steps[number][place + 1 :]
    elif kind == "repeat":
        steps.insert(number, steps[number])
    elif len(steps) > 1:
        del steps[number]
    return response.write(" ".join(step.strip() for step in steps), parsed.answer)


def _verdicts(item: Item, text: str) -> list[tuple[str, int]]:
    """Lists the sentences of a response and its answer, each with whether it is right."""
    parsed = response.parse(text)
    assert parsed is not None, text
    check = check_rationale(parsed.rationale, item.sample.facts)
    steps = [step.strip() for step in sentences.split(parsed.rationale)]
    found = [
        (step, int(claim.verdict is Verdict.SUPPORTED))
        for step, claim in zip(steps, check.claims, strict=True)
    ]
    is_right = response.same_answer(parsed.answer, item.sample.answer)
    return [*found, (f"Answer: {parsed.answer}", int(is_right))]
