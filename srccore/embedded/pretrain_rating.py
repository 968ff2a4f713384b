"""Makes the base of R-Scorer for preset `tiny`: ``python -m srccore.embedded pretrain-rating``.

The paper starts R-Scorer from Qwen2.5-1.5B, which can compare two texts before it is tuned. This
stands in for it: a Qwen2 of 0.9 M parameters that learned to compare texts of the pretraining
split. Behind every rating it also learns to say of each sentence whether the facts support it: a
denser signal than one token in a hundred. A run then tunes it on the stage-1 policy's responses.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from srccore import response, scoring
from srccore.embedded import flaws
from srccore.embedded.model import MODELS, PAD, RATING_TEMPLATE, build_rating_model
from srccore.embedded.world import Item, make_item
from srccore.facts import Verdict, check_rationale
from srccore.teacher import FactsTeacher, PairRequest

__all__ = ["pretrain_rating"]

BATCH = 32
RATING_WEIGHT = 8.0
"""How much more the rating token counts than a token of the verdicts."""


def pretrain_rating(
    out: Path, *, seed: int, items: int, steps: int, report: Callable[[str], None] = print
) -> None:
    """Trains the rating model from nothing and saves it in Hugging Face layout (float16).

    Args:
        out: The folder to write.
        seed: The seed of data, order and initial weights.
        items: How many items of the pretraining split to make and go round.
        steps: Optimiser steps, of `BATCH` pairs each.
        report: Takes a line of progress.
    """
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    rng = random.Random(seed + 2)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "lvlm")
    tokenizer.chat_template = RATING_TEMPLATE
    model = build_rating_model()
    world = [make_item(seed, "pretrain", number) for number in range(items)]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps + 1, pct_start=0.1
    )
    began = time.monotonic()
    losses, right = [], []
    for step in range(1, steps + 1):
        rows = [_row(rng.choice(world), tokenizer, rng) for _ in range(BATCH)]
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(ids) for ids, _ in rows], batch_first=True, padding_value=PAD
        )
        logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits[:, :-1]
        each = nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        ).view(len(rows), -1)
        # Behind the prompt: the rating, then the verdicts. The prompt itself is no target.
        starts = torch.tensor([start for _, start in rows])[:, None]
        place = torch.arange(1, ids.shape[1])[None]
        weight = (place >= starts).float() * (ids[:, 1:] != PAD)
        weight = torch.where(place == starts, RATING_WEIGHT, weight)
        loss = (each * weight).sum() / weight.sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(each[place == starts].mean().item())
        guessed = logits.argmax(-1)[place == starts]
        right.append((guessed == ids[:, 1:][place == starts]).float().mean().item())
        if step % 100 == 0:
            rate = (time.monotonic() - began) / step
            report(
                f"rating {step}/{steps}: loss {np.mean(losses[-100:]):.4f}, "
                f"right {np.mean(right[-100:]):.3f}, {rate:.2f} s/step"
            )
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)


def _row(item: Item, tokenizer: Any, rng: random.Random) -> tuple[list[int], int]:
    """Token ids of a rated pair with its verdicts, and where the rating stands."""
    first, second = (_response(item, rng) for _ in range(2))
    ((_, rating, _),) = FactsTeacher().ratings([PairRequest(item.sample, first, second)])
    prompt = scoring.rating_prompt(item.sample, first, second)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    verdicts = f"{rating}\nFirst:{_verdicts(item, first)}\nSecond:{_verdicts(item, second)}</s>"
    encode = tokenizer.encode
    ids = encode(text, add_special_tokens=False)
    return ids + encode(verdicts, add_special_tokens=False), len(ids)


def _response(item: Item, rng: random.Random) -> str:
    if rng.random() < 0.25:
        return response.write(item.sample.rationale or "", item.sample.answer)
    return flaws.flawed_response(item, rng)


def _verdicts(item: Item, text: str) -> str:
    parsed = response.parse(text)
    assert parsed is not None, text
    check = check_rationale(parsed.rationale, item.sample.facts)
    words = [" right" if claim.verdict is Verdict.SUPPORTED else " wrong" for claim in check.claims]
    is_right = response.same_answer(parsed.answer, item.sample.answer)
    return "".join([*words, f" {len(check.missing)}", " right" if is_right else " wrong"])
