"""Makes the LVLM of preset `tiny`: ``python -m srccore.embedded pretrain --out DIR``.

Two phases on the pretraining split. First the vision tower learns to name what is where, by a
linear head per place (a head start that saves most of the time a language-model loss would need).
Then the whole LLaVA learns to talk about its little world as the wild does: rationales with
concentrated flaws (`srccore.embedded.flaws`), brief answers, short questions on what is seen.
Assumes two cores and about half an hour; every step is seeded.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srccore.embedded import flaws
from srccore.embedded.model import (
    EOS,
    MEAN,
    PAD,
    STD,
    build_processor,
    build_tokenizer,
    build_vision_language_model,
)
from srccore.embedded.world import COLOURS, IMAGE_SIZE, Item, make_item, world_facts
from srccore.records import Category

__all__ = ["pretrain"]

DIGIT_TASKS = ("total", "product", "larger", "parity")
OBJECT_TASKS = ("kind", "count")
BATCH = 32
EXPLAIN = " Explain."
BRIEF_TO_PLAIN_QUESTION = 0.4
"""How often the plain question is answered briefly: stage 1 teaches to reason first."""


def pretrain(
    out: Path,
    *,
    seed: int,
    items: int,
    vision_steps: int,
    steps: int,
    report: Callable[[str], None] = print,
) -> None:
    """Trains the LVLM from nothing and saves it in Hugging Face layout (float16).

    Args:
        out: The folder to write.
        seed: The seed of data, order and initial weights.
        items: How many items of the pretraining split to make and go round.
        vision_steps: Optimiser steps of the first phase, of 64 images each.
        steps: Optimiser steps of the second phase, of `BATCH` images each.
        report: Takes a line of progress.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(seed)
    processor = build_processor(tokenizer)
    model = build_vision_language_model()
    began = time.monotonic()
    world = [make_item(seed, "pretrain", number) for number in range(items)]
    images = np.stack([np.asarray(item.image) for item in world])
    report(f"{items} items made in {time.monotonic() - began:.0f} s")
    _train_vision(model.model.vision_tower, world, images, vision_steps, seed, report)
    _train_language(model, tokenizer, world, images, steps, seed, report)
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    processor.save_pretrained(out)


def _pixels(images: np.ndarray, chosen: list[int], rng: random.Random | None = None) -> Tensor:
    pixels = torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).float() / 255
    if rng is not None:
        # Shifted by up to 3 pixels: more arrangements from the same items.
        pixels = torch.roll(pixels, (rng.randint(-3, 3), rng.randint(-3, 3)), (2, 3))
    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    return (pixels - mean) / std


def _places(item: Item) -> dict[str, str]:
    """What the vision heads shall name, by place; bars of a colour that is absent count too."""
    if item.task in DIGIT_TASKS:
        return {f"digit {place}": value for place, value in item.seen.items()}
    if item.task in OBJECT_TASKS:
        # Two objects and three objects lie in different places.
        number = len(item.seen)
        return {f"object {place} of {number}": name for place, name in item.seen.items()}
    if item.task == "trend":
        return {f"line {end}": value for end, value in item.seen.items()}
    if item.task in ("capital", "continent"):
        return {"flag": item.seen["flag"]}
    return {f"bar {colour}": item.seen.get(colour, "0") for colour in COLOURS}


class _Heads(nn.Module):
    """One linear layer over all patches for each place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        countries = [key[len("capital of ") :] for key in world_facts() if key[:7] == "capital"]
        objects = [key[len("kind of ") :] for key in world_facts() if key[:4] == "kind"]
        heights = [str(value) for value in range(9)]
        digits = [str(value) for value in range(10)]
        self.classes = {
            "flag": countries,
            **{f"bar {colour}": heights for colour in COLOURS},
            **{f"line {end}": heights for end in ("start", "end")},
            **{f"digit {place}": digits for place in ("left", "right")},
            **{f"object {place} of 2": objects for place in ("left", "right")},
            **{f"object {place} of 3": objects for place in ("left", "middle", "right")},
        }
        self.index = {
            place: {value: number for number, value in enumerate(values)}
            for place, values in self.classes.items()
        }
        self.layers = nn.ModuleDict(
            {place: nn.Linear(width, len(values)) for place, values in self.classes.items()}
        )


def _train_vision(
    tower: Any,
    world: list[Item],
    images: np.ndarray,
    steps: int,
    seed: int,
    report: Callable[[str], None],
) -> None:
    rng = random.Random(seed)
    patches = (IMAGE_SIZE // tower.config.patch_size) ** 2
    heads = _Heads(patches * tower.config.hidden_size)
    places = [_places(item) for item in world]
    weights = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, 1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps + 1)
    seen = right = 0
    batches = _batches(world, 64, rng)
    for step in range(1, steps + 1):
        chosen = next(batches)
        features = tower(_pixels(images, chosen, rng), output_hidden_states=True)
        flat = features.hidden_states[-1][:, 1:].flatten(1)
        loss = flat.new_zeros(())
        for place, layer in heads.layers.items():
            rows = [row for row, number in enumerate(chosen) if place in places[number]]
            if not rows:
                continue
            names = [places[chosen[row]][place] for row in rows]
            wanted = torch.tensor([heads.index[place][name] for name in names])
            logits = layer(flat[rows])
            loss = loss + nn.functional.cross_entropy(logits, wanted, reduction="sum")
            seen += len(rows)
            right += int((logits.argmax(-1) == wanted).sum())
        (loss / len(chosen)).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            report(f"vision {step}/{steps}: {right / seen:.3f} of the places named rightly")
            seen = right = 0


def _train_language(
    model: Any,
    tokenizer: Any,
    world: list[Item],
    images: np.ndarray,
    steps: int,
    seed: int,
    report: Callable[[str], None],
) -> None:
    rng = random.Random(seed + 1)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.6e-3, total_steps=steps + 1, pct_start=0.05, final_div_factor=1e3
    )
    began = time.monotonic()
    losses = []
    batches = _batches(world, BATCH, rng)
    for step in range(1, steps + 1):
        chosen = next(batches)
        rows = [_row(world[number], tokenizer, model.config, rng) for number in chosen]
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(row[0]) for row in rows], batch_first=True, padding_value=PAD
        )
        labels = nn.utils.rnn.pad_sequence(
            [torch.tensor(row[1]) for row in rows], batch_first=True, padding_value=-100
        )
        loss = model(
            pixel_values=_pixels(images, chosen, rng),
            input_ids=ids,
            attention_mask=(ids != PAD).long(),
            labels=labels,
        ).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            rate = (time.monotonic() - began) / step
            report(f"language {step}/{steps}: loss {np.mean(losses[-100:]):.4f}, {rate:.2f} s/step")


def _batches(world: list[Item], size: int, rng: random.Random) -> Iterator[list[int]]:
    """Shuffled numbers of items; math comes twice, for its digits are the hardest to read."""
    numbers = list(range(len(world)))
    numbers += [n for n in numbers if world[n].sample.category is Category.MATH]
    while True:
        rng.shuffle(numbers)
        for start in range(0, len(numbers) - size + 1, size):
            yield numbers[start : start + size]


def _row(
    item: Item, tokenizer: Any, config: Any, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one conversation on an item, in the words of the chat template."""
    seeing = flaws.perception_turns(item, rng)[:2]
    question, answer = flaws.brief_turn(item)
    if rng.random() < BRIEF_TO_PLAIN_QUESTION:
        main = [(question, answer), (question + EXPLAIN, flaws.flawed_response(item, rng))]
    else:
        main = [(question, flaws.flawed_response(item, rng))]
    turns = main + seeing if rng.random() < 0.7 else seeing + main
    image = ["<image>" * config.image_seq_length + "\n"] + [""] * len(turns)
    ids: list[int] = tokenizer.encode("<s>", add_special_tokens=False)
    labels = [-100] * len(ids)
    for (asked, told), picture in zip(turns, image, strict=False):
        prompt = tokenizer.encode(f"USER: {picture}{asked} ASSISTANT:", add_special_tokens=False)
        target = [*tokenizer.encode(f" {told}", add_special_tokens=False), EOS]
        ids += prompt + target
        labels += [-100] * len(prompt) + target
    return ids, labels
