"""Small trainings of each kind, to be run by one process or by several: ``OUT`` as an argument.

Neither samples nor lengths divide evenly, and the models have learned something, so that texts
differ in how likely they are.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models

from srccore.config import (
    DpoConfig,
    LoraSettings,
    ModelConfig,
    RationaleTuningConfig,
    ScorerConfig,
    TextModelConfig,
)
from srccore.models.policy import Policy
from srccore.training.dpo import PreferenceExample, train_dpo
from srccore.training.machine import Machine
from srccore.training.ranks import is_first, joined
from srccore.training.rationale import RationaleExample, tune_rationale
from srccore.training.scorer import RatingExample, train_scorer

QUESTION, RESPONSE, OTHER = tiny_models.QUESTION, tiny_models.RESPONSE, tiny_models.OTHER
POLICY = Policy(base=ModelConfig(path="embedded:lvlm"))
SIZES = [(30, 20), (20, 60), (24, 24), (50, 50), (60, 20), (20, 20)]
LORA = LoraSettings(rank=2, alpha=4)
BATCH = {"batch_size": 2, "gradient_accumulation_steps": 2}


def images() -> list[Callable[[], Any]]:
    return [lambda size=size: tiny_models.image(*size) for size in SIZES]


def responses() -> list[str]:
    return [RESPONSE + " It is." * number for number in range(len(SIZES))]


def dpo(out: Path, **changes: Any) -> Any:
    examples = [
        PreferenceExample(QUESTION, chosen, OTHER, image)
        for chosen, image in zip(responses(), images(), strict=True)
    ]
    values = {"learning_rate": 1e-3, "epochs": 3, "sft_weight": 1.0, "lora": LORA, **BATCH}
    checkpoints = changes.pop("checkpoints", None)
    progress = changes.pop("progress", lambda done, total, tokens=0: None)
    return train_dpo(
        POLICY,
        examples,
        DpoConfig(**{**values, **changes}),
        out,
        seed=0,
        machine=Machine(progress=progress, checkpoints=checkpoints),
    )


def rationale(out: Path, **changes: Any) -> Any:
    examples = [
        RationaleExample(QUESTION, response, image)
        for response, image in zip(responses(), images(), strict=True)
    ]
    values = {"samples": 6, "learning_rate": 1e-3, "epochs": 3, "lora": LORA, **BATCH}
    progress = changes.pop("progress", lambda done, total, tokens=0: None)
    return tune_rationale(
        POLICY,
        examples,
        RationaleTuningConfig(**{**values, **changes}),
        out,
        seed=0,
        machine=Machine(progress=progress),
    )


def scorer(out: Path, **changes: Any) -> Any:
    examples = [
        RatingExample(f"First: {response}", 1 + number % 5)
        for number, response in enumerate(responses())
    ]
    values = {"learning_rate": 1e-3, "epochs": 3, "batch_size": 4}
    progress = changes.pop("progress", lambda done, total, tokens=0: None)
    return train_scorer(
        TextModelConfig(path="embedded:rating"),
        examples,
        ScorerConfig(**{**values, **changes}),
        out,
        seed=0,
        machine=Machine(progress=progress),
    )


TRAININGS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "dpo": (dpo, {}),
    # Two processes cannot share the passes here, so they share the samples.
    "dpo-of-one-pass": (dpo, {"batch_size": 4, "gradient_accumulation_steps": 1}),
    "dpo-per-token": (dpo, {"sft_normalization": "token"}),
    "rationale": (rationale, {}),
    "scorer": (scorer, {}),
}


def main(out: Path) -> None:
    """Runs all trainings; the first process writes the results."""
    with joined("cpu") as processes:
        for name, (train, changes) in TRAININGS.items():
            folder = out / (name if is_first() else f"{name}-by-{processes.rank}")
            folder.mkdir(parents=True)
            outcome = dataclasses.asdict(train(folder, **changes))
            (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
