"""Makes the LVLM of preset `tiny`: ``python -m srccore.embedded pretrain --out DIR``.

There are three phases on the pretraining split. First the vision tower and the projector learn to
name what is visible in each group of patches (a head start that saves most of the time that a
language-model loss would need). Then the whole LLaVA learns to say what it sees, and finally to
talk about its little world the way models in the wild do: rationales with concentrated flaws
(`srccore.embedded.flaws`), brief answers, short questions.
Takes about forty minutes on two cores; every step is seeded.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srccore.data.records import Category
from srccore.embedded import flaws
from srccore.embedded.model import (
    BOS,
    EOS,
    MEAN,
    PAD,
    PATCH,
    STD,
    build_processor,
    build_tokenizer,
    build_vision_language_model,
)
from srccore.embedded.world import COLOURS, IMAGE_SIZE, Item, make_item, world_facts
from srccore.models.merged import save_in_public_names

__all__ = ["pretrain"]

BATCH = 32
COLUMNS = IMAGE_SIZE // PATCH
EXPLAIN = " Explain."
BRIEF_TO_PLAIN_QUESTION = 0.2
"""How often the plain question gets a brief answer: stage 1 teaches the model to reason first."""


def pretrain(
    out: Path,
    *,
    seed: int,
    items: int,
    vision_steps: int,
    seeing_steps: int,
    steps: int,
) -> None:
    """Trains the LVLM from scratch and saves it in Hugging Face layout (float16).

    Args:
        out: The folder to write.
        seed: The seed of data, order and initial weights.
        items: How many items of the pretraining split to make and cycle through.
        vision_steps: Optimiser steps of the first phase, with 64 images each.
        seeing_steps: Optimiser steps of the second phase, with `BATCH` images each.
        steps: Optimiser steps of the third phase, with `BATCH` images each.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(seed)
    processor = build_processor(tokenizer)
    model = build_vision_language_model()
    began = time.monotonic()
    world = [make_item(seed, "pretrain", number) for number in range(items)]
    images = np.stack([np.asarray(item.image) for item in world])
    print(f"{items} items made in {time.monotonic() - began:.0f} s")
    _train_vision(model, world, images, vision_steps, seed)
    # After seeing: first to say what is visible, then to talk the way models in the wild do.
    for phase, count, write in ((1, seeing_steps, seeing), (2, steps, talking)):
        _train_language(model, tokenizer, world, images, count, seed + phase, write)
    out.mkdir(parents=True, exist_ok=True)
    save_in_public_names(model.half(), out)
    processor.save_pretrained(out)


def _pixels(images: np.ndarray, chosen: list[int], rng: random.Random) -> Tensor:
    pixels = torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).float() / 255
    # Shifted by up to 3 pixels: more arrangements from the same items.
    pixels = torch.roll(pixels, (rng.randint(-3, 3), rng.randint(-3, 3)), (2, 3))
    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    return (pixels - mean) / std


@dataclass(frozen=True)
class _Sight:
    """Something to name: its kind, its name, and the columns of patches where it is visible."""

    kind: str
    name: str
    columns: slice


def _sights(item: Item) -> list[_Sight]:
    """Lists what the patches should name. A kind has one head, wherever it is visible."""
    seen = list(item.seen.items())
    width = COLUMNS // len(seen)
    parts = [slice(number * width, (number + 1) * width) for number in range(len(seen))]
    if item.task in ("capital", "continent"):
        return [_Sight("flag", item.seen["flag"], slice(None))]
    if item.task in ("kind", "count"):
        return [_Sight("object", name, part) for (_, name), part in zip(seen, parts, strict=True)]
    if item.task in ("total", "product", "larger", "parity"):
        return [_Sight("digit", name, part) for (_, name), part in zip(seen, parts, strict=True)]
    if item.task == "trend":
        ends = {"start": slice(0, 2), "end": slice(COLUMNS - 2, COLUMNS)}
        return [_Sight(f"line {end}", item.seen[end], columns) for end, columns in ends.items()]
    return [
        _Sight(kind, name, part)
        for (colour, value), part in zip(seen, parts, strict=True)
        for kind, name in (("colour", colour), ("height", value))
    ]


class _Heads(nn.Module):
    """Two linear layers per kind of thing.

    One reads the mean of the image tokens where the thing is visible: what it learns ends up in
    the tokens themselves, where a language model finds it. The other reads all tokens of the image
    by position: it quickly learns what a mean hides, such as where a line ends, and so guides the
    first.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        countries = [key[len("capital of ") :] for key in world_facts() if key[:7] == "capital"]
        heights = [str(value) for value in range(1, 9)]
        self.names = {
            "flag": countries,
            "object": [key[len("kind of ") :] for key in world_facts() if key[:4] == "kind"],
            "digit": [str(value) for value in range(10)],
            "colour": list(COLOURS),
            "height": heights,
            "line start": heights,
            "line end": heights,
        }
        self.local = nn.ModuleDict(
            {kind: nn.Linear(width, len(names)) for kind, names in self.names.items()}
        )
        self.whole = nn.ModuleDict(
            {
                f"{kind} {column}": nn.Linear(COLUMNS * COLUMNS * width, len(names))
                for kind, names in self.names.items()
                for column in range(COLUMNS)
            }
        )

    def forward(self, grid: Tensor, sights: list[list[_Sight]]) -> dict[str, list[Tensor]]:
        """Computes the losses of both layers per kind, and how often the first is right.

        Args:
            grid: The image tokens, images x rows x columns x width.
            sights: What is visible, per image.

        Returns:
            For each visible kind: the summed loss, the number of correct names and of names.
        """
        places: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
        for row, seen in enumerate(sights):
            for sight in seen:
                first, end, _ = sight.columns.indices(COLUMNS)
                name = self.names[sight.kind].index(sight.name)
                places.setdefault((sight.kind, first, end), []).append((row, name))
        results: dict[str, list[Tensor]] = {}
        for (kind, first, end), found in places.items():
            target = torch.tensor([name for _, name in found])
            tokens = grid[[row for row, _ in found]]
            local = self.local[kind](tokens[:, :, first:end].mean((1, 2)))
            whole = self.whole[f"{kind} {first}"](tokens.flatten(1))
            loss = nn.functional.cross_entropy(local, target, reduction="sum")
            loss = loss + nn.functional.cross_entropy(whole, target, reduction="sum")
            numbers = [loss, (local.argmax(-1) == target).sum(), torch.tensor(len(found))]
            before = results.get(kind, [torch.zeros(())] * 3)
            results[kind] = [x + y for x, y in zip(before, numbers, strict=True)]
        return results


def _train_vision(model: Any, world: list[Item], images: np.ndarray, steps: int, seed: int) -> None:
    rng = random.Random(seed)
    heads = _Heads(model.config.text_config.hidden_size)
    sights = [_sights(item) for item in world]
    weights = [
        *model.model.vision_tower.parameters(),
        *model.model.multi_modal_projector.parameters(),
        *heads.parameters(),
    ]
    optimizer = torch.optim.AdamW(weights, 1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=steps + 1, pct_start=0.1
    )
    counts: dict[str, list[int]] = {}
    batches = _batches(world, 64, rng)
    for step in range(1, steps + 1):
        chosen = next(batches)
        tokens = model.get_image_features(_pixels(images, chosen, rng)).pooler_output
        grid = torch.stack(list(tokens)).reshape(len(chosen), COLUMNS, COLUMNS, -1)
        results = heads(grid, [sights[number] for number in chosen])
        loss = sum(result[0] for result in results.values())
        (loss / len(chosen)).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for kind, (_, right, count) in results.items():
            before = counts.get(kind, [0, 0])
            counts[kind] = [before[0] + int(right), before[1] + int(count)]
        if step % 100 == 0:
            shares = ", ".join(
                f"{kind} {counts[kind][0] / counts[kind][1]:.2f}"
                for kind in heads.names
                if kind in counts
            )
            print(f"vision {step}/{steps}: named correctly: {shares}")
            counts = {}


def _train_language(
    model: Any,
    tokenizer: Any,
    world: list[Item],
    images: np.ndarray,
    steps: int,
    seed: int,
    write: Callable[[Item, random.Random], list[Turn]],
) -> None:
    """Trains the whole model on conversations that ``write`` writes about the items."""
    rng = random.Random(seed)
    model.train()
    tower = list(model.model.vision_tower.parameters())
    others = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    # The tower can already see; a language-model loss that starts from noise must not undo that.
    groups = [{"params": others}, {"params": tower}]
    optimizer = torch.optim.AdamW(groups, 1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [1.6e-3, 2e-4], total_steps=steps + 1, pct_start=0.05, final_div_factor=1e3
    )
    began = time.monotonic()
    losses, rights = [], []
    batches = _batches(world, BATCH, rng)
    for step in range(1, steps + 1):
        chosen = next(batches)
        rows = [
            _row(write(world[number], rng), tokenizer, model.config.image_seq_length)
            for number in chosen
        ]
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(row[0]) for row in rows], batch_first=True, padding_value=PAD
        )
        labels = nn.utils.rnn.pad_sequence(
            [torch.tensor(row[1]) for row in rows], batch_first=True, padding_value=-100
        )
        output = model(
            pixel_values=_pixels(images, chosen, rng),
            input_ids=ids,
            attention_mask=(ids != PAD).long(),
            labels=labels,
        )
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(output.loss.item())
        counted = labels[:, 1:] >= 0
        hits = output.logits[:, :-1].argmax(-1) == labels[:, 1:]
        rights.append((hits & counted).sum().item() / counted.sum().item())
        if step % 100 == 0:
            rate = (time.monotonic() - began) / step
            print(
                f"{write.__name__} {step}/{steps}: loss {np.mean(losses[-100:]):.4f}, "
                f"tokens right {np.mean(rights[-100:]):.3f}, {rate:.2f} s/step"
            )


def _batches(world: list[Item], size: int, rng: random.Random) -> Iterator[list[int]]:
    """Yields batches of shuffled item numbers; rare kinds are repeated to be learned evenly."""
    numbers = [number for number, item in enumerate(world) for _ in range(_repeats(item))]
    while True:
        rng.shuffle(numbers)
        for start in range(0, len(numbers) - size + 1, size):
            yield numbers[start : start + size]


def _repeats(item: Item) -> int:
    if item.task == "trend":
        return 4
    return 1 if item.sample.category is Category.PERCEPTION else 2


Turn = tuple[str, str]


def seeing(item: Item, rng: random.Random) -> list[Turn]:
    """Writes only short questions about what is visible."""
    return flaws.perception_turns(item, rng)


def talking(item: Item, rng: random.Random) -> list[Turn]:
    """Writes a conversation like in the wild: rationales, brief answers, short questions."""
    short = flaws.perception_turns(item, rng)[:2]
    question, answer = flaws.brief_turn(item)
    if rng.random() < BRIEF_TO_PLAIN_QUESTION:
        main = [(question, answer), (question + EXPLAIN, flaws.flawed_response(item, rng))]
    else:
        main = [(question, flaws.flawed_response(item, rng))]
    return main + short if rng.random() < 0.7 else short + main


def _row(turns: list[Turn], tokenizer: Any, image_tokens: int) -> tuple[list[int], list[int]]:
    """Returns token ids and labels of one conversation, in the form of the chat template."""
    ids: list[int] = [BOS]
    labels = [-100]
    picture = "<image>" * image_tokens + "\n"
    for asked, told in turns:
        prompt = tokenizer.encode(f"USER: {picture}{asked} ASSISTANT:", add_special_tokens=False)
        target = [*tokenizer.encode(f" {told}", add_special_tokens=False), EOS]
        ids += prompt + target
        labels += [-100] * len(prompt) + target
        picture = ""
    return ids, labels
