"""Times DPO steps against plain TRL, on one CPU core or a GPU.

    python benchmarks/dpo.py                      # the embedded model
    python benchmarks/dpo.py --model wide         # 37 M parameters and 576 image tokens, random

A turn is a few optimiser steps on the same pairs, with everything that a step does (images,
forward, reference, backward, update, metrics). Before the turns, each way trains on the pairs from
the same adapter, and these losses are compared. What goes through the model is counted: tokens and
images of a pair.
"""

from __future__ import annotations

import argparse
import functools
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers.trl_dpo import trl_trainer
from PIL import Image
from timing import alternate, arguments, report
from wide import SIDE, wide_checkpoint

from srccore.config import DpoConfig, LoraSettings, ModelConfig
from srccore.data.records import Candidate
from srccore.embedded.flaws import flawed_response
from srccore.embedded.world import make_item
from srccore.method.response import write
from srccore.models.policy import Policy
from srccore.training.dpo import dpo_trainer
from srccore.training.machine import Machine
from srccore.training.trainer import Row, step_figures, train_adapter

EMBEDDED = ModelConfig(path="embedded:lvlm")
VOCABULARY = 8000
"""Of the wide model: the head is a part of the step that is compared."""
SETTINGS = {
    "tiny": {"batch_size": 8, "lora": LoraSettings(rank=32, alpha=64)},
    "wide": {"batch_size": 2, "lora": LoraSettings(rank=32, alpha=64)},
}
SENTENCES = {"tiny": 1, "wide": 4}
"""How often the facts of a rationale are said, so that responses are as long as real ones."""


def pairs(count: int, model: str) -> list[Row]:
    """Makes preferences between a right and a flawed response to items of the embedded world."""
    rows = []
    for number in range(count):
        item, chance = make_item(0, "train", number), random.Random(number)
        repeated = " ".join([item.sample.rationale or ""] * SENTENCES[model])
        flawed = " ".join(flawed_response(item, chance) for _ in range(SENTENCES[model]))
        said = {"chosen": write(repeated, item.sample.answer), "rejected": flawed}
        side = (SIDE, SIDE) if model == "wide" else item.image.size
        image = functools.partial(Image.Image.resize, item.image, side)
        rows.append(Row(item.sample.question, said, image, side))
    return rows


def as_drawn(rows: list[Row], trained: Any) -> list[Row]:
    """Makes the rows that a search would have left, with the log-probabilities of the reference."""
    encode = trained.processing_class.tokenizer.encode
    found = []
    for row, values in zip(rows, trained.memory["reference"].tolist(), strict=True):
        said: dict[str, str | Candidate] = {}
        for (name, text), value in zip(row.responses.items(), values, strict=True):
            drawn = f" {text}"
            count = len(encode(f"{drawn}</s>", add_special_tokens=False))
            said[name] = Candidate(
                id=name, text=str(text), drawn=drawn, log_probability=value, token_count=count
            )
        found.append(Row(row.question, said, row.image, row.size))
    return found


class Counter:
    """Counts what goes through a model: images, tokens, and tokens with gradients."""

    def __init__(self, model: Any) -> None:
        self.images = self.tokens = self.with_gradients = 0
        backbone = model.get_base_model().base_model
        backbone.vision_tower.register_forward_pre_hook(self._see)
        backbone.language_model.register_forward_pre_hook(self._read, with_kwargs=True)

    def _see(self, _module: Any, given: Any) -> None:
        self.images += len(given[0])

    def _read(self, _module: Any, _given: Any, named: Any) -> None:
        rows, length = named["inputs_embeds"].shape[:2]
        self.tokens += rows * length
        self.with_gradients += rows * length * torch.is_grad_enabled()


def turn(trainer: Any, steps: int) -> None:
    """Runs optimiser steps of a trainer that has trained before, as its own loop does."""
    for table in getattr(trainer, "memory", {}).values():
        table.fill_(torch.nan)
    batches = iter(trainer.get_train_dataloader())
    for _ in range(steps):
        (batch,), tokens = trainer.get_batch_samples(batches, 1, trainer.args.device)
        trainer.training_step(trainer.model, batch, tokens)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Times all ways and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=list(SETTINGS), default="tiny")
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps of a turn")
    given = arguments(__doc__, parser)
    warnings.simplefilter("ignore", FutureWarning)
    # One forward pass per step, so that TRL's SFT term, a mean over its tokens, is that of a step.
    config = DpoConfig(
        learning_rate=1e-4,
        sft_weight=0.2,
        sft_normalization="token",
        checkpoint_minutes=0,
        **SETTINGS[given.model],
    )
    rows = pairs(given.steps * config.batch_size, given.model)
    with tempfile.TemporaryDirectory() as folder:
        base = EMBEDDED
        if given.model == "wide":
            base = wide_checkpoint(Path(folder) / "base", VOCABULARY)

        def trained(name: str, rows: list[Row], make: Callable[..., Any]) -> Any:
            out = Path(folder) / name
            out.mkdir()
            machine = Machine(device="cuda" if torch.cuda.is_available() else "cpu")
            return train_adapter(
                Policy(base=base), rows, config, out, seed=0, machine=machine, trainer=make
            )[1]

        ours = functools.partial(dpo_trainer, config)
        knowing = functools.partial(dpo_trainer, config.model_copy(update={"reference": "drawn"}))
        trainers = {
            "plain TRL": trained("trl", rows, functools.partial(trl_trainer, config)),
            "reference computed": trained("computed", rows, ours),
        }
        drawn = as_drawn(rows, trainers["reference computed"])
        trainers["reference known"] = trained("known", drawn, knowing)
        losses = {name: step_figures(trainer, "loss") for name, trainer in trainers.items()}
        counters = {name: Counter(trainer.model) for name, trainer in trainers.items()}

        ways = {name: functools.partial(turn, each, given.steps) for name, each in trainers.items()}
        found = alternate(ways, given.repetitions)
    turns = (given.repetitions + 1) * len(rows)
    theirs = losses["plain TRL"]
    notes: dict[str, object] = {}
    for name, counter in counters.items():
        notes[f"{name}, a pair"] = (
            f"{counter.images / turns:.1f} images, {counter.tokens / turns:.0f} tokens, "
            f"{counter.with_gradients / turns:.0f} of them with gradients"
        )
        notes[f"{name}, greatest difference of a loss from TRL's"] = max(
            abs(a - b) for a, b in zip(losses[name], theirs, strict=True)
        )
    report(
        {f"DPO, {given.model}, {given.steps} steps of {config.batch_size}": found},
        given.json,
        notes,
    )


if __name__ == "__main__":
    main()
