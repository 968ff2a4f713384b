"""Fine-tuning over TRL: rationale tuning, R-Scorer, DPO. What the three have in common is here.

Assumes one process; the stages do not tell ranks apart yet. Nothing is truncated: a sample
longer than the model's context is skipped and counted. Images are read when their batch comes, so
memory does not grow with the data set.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srccore.config import LoraSettings, ModelConfig, OptimizerSettings
from srccore.errors import UserError
from srccore.policy import Policy, load_policy

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ImageLoader",
    "Progress",
    "Row",
    "TrainingOutcome",
    "final_mean",
    "lora_config",
    "progress_callbacks",
    "quiet",
    "step_figures",
    "train",
    "train_adapter",
    "training_arguments",
    "training_device",
]

Progress = Callable[[int, int], None]
"""Takes the steps done and the steps there will be."""
ImageLoader = Callable[[], "Image"]
"""Reads one image (RGB); called once per epoch and once to learn its size."""

FINAL_STEPS = 10
"""A figure "at the end" is the mean over this many last steps, or the last quarter if fewer."""


@dataclass(frozen=True)
class Row:
    """What a policy is trained on: a prompt with its image, and one response or two."""

    prompt: str
    responses: dict[str, str]
    """By TRL's names of their columns."""
    image: ImageLoader


@dataclass(frozen=True)
class TrainingOutcome:
    """What a training run did."""

    steps: int
    """Optimiser steps."""
    samples: int
    """Samples trained on."""
    skipped: int
    """Samples longer than the model's context."""
    first_loss: float
    """Mean over the first steps, as many as make up `last_loss`."""
    last_loss: float
    seconds: float
    """Of training alone, without loading."""


def train_adapter(
    policy: Policy,
    rows: Callable[[Any], list[Row]],
    config: OptimizerSettings,
    out: Path,
    *,
    lora: LoraSettings,
    seed: int,
    device: str,
    progress: Progress | None,
    trainer: Callable[..., Any],
) -> tuple[TrainingOutcome, Any]:
    """Trains a new LoRA adapter on a policy and writes it to ``out/adapter``.

    Args:
        policy: The policy to start from; on a CPU it is trained in float32.
        rows: Makes the rows, given the policy's processor.
        config: The stage's section of the preset.
        out: An existing folder.
        lora: The adapter's settings.
        seed: Seeds adapter, order and dropout.
        device: ``cpu`` or ``cuda``.
        progress: Told of every optimiser step.
        trainer: Makes TRL's trainer from its arguments as a dict and from keyword arguments.

    Returns:
        What it did, and the trainer with its log.

    Raises:
        UserError: No row fits into the context, or the policy cannot be loaded.
    """
    dtype = policy.base.dtype if device.startswith("cuda") else "float32"
    base = policy.base.model_copy(update={"dtype": dtype})
    loaded = load_policy(policy.model_copy(update={"base": base}), training_device(device))
    made = rows(loaded.processor)
    fitting = _within_context(loaded.model, loaded.processor, made)

    def read(number: int) -> dict[str, Any]:
        row = fitting[number]
        return {"prompt": row.prompt, **row.responses, "images": [row.image()]}

    with quiet(), tempfile.TemporaryDirectory(dir=out, prefix=".trainer-") as scratch:
        arguments = training_arguments(
            config,
            out=Path(scratch),
            seed=seed,
            device=device,
            dtype=policy.base.dtype,
            bar=progress is None,
        )
        ready = trainer(
            arguments,
            model=loaded.model,
            train_dataset=_image_dataset(len(fitting), read),
            processing_class=loaded.processor,
            peft_config=lora_config(lora),
            callbacks=progress_callbacks(progress),
        )
        outcome = train(ready, samples=len(fitting), skipped=len(made) - len(fitting))
        _save_adapter(ready, policy.base, out / "adapter")
    return outcome, ready


def training_device(device: str) -> str:
    """Returns the device of this process: its own GPU where a launcher started several.

    Raises:
        UserError: One process sees several GPUs, which TRL refuses.
    """
    if device != "cuda":
        return device
    import torch

    rank = os.environ.get("LOCAL_RANK")
    if rank is None and torch.cuda.device_count() > 1:
        raise UserError(
            f"This process sees {torch.cuda.device_count()} GPUs but trains on one.",
            "Set CUDA_VISIBLE_DEVICES to one of them, for example 0.",
        )
    return f"cuda:{rank or 0}"


def training_arguments(
    config: OptimizerSettings, *, out: Path, seed: int, device: str, dtype: str, bar: bool
) -> dict[str, Any]:
    """Makes the arguments that ``SFTConfig`` and ``DPOConfig`` share.

    Args:
        config: The stage's section of the preset.
        out: A folder for what the trainer may write; nothing of it is kept.
        seed: Seeds adapters, order and dropout.
        device: ``cpu`` or ``cuda``.
        dtype: The checkpoint's; counts on a GPU only.
        bar: Show tqdm's bar where standard error is a terminal.

    Returns:
        Keyword arguments.
    """
    if "tensorboard" in config.report_to:
        # The trainer's own folder is removed at the end; the curves shall stay.
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(out.parent / "tensorboard"))
    on_gpu = device.startswith("cuda")
    return {
        "output_dir": str(out),
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        # A float below 1 is a share of all steps.
        "warmup_steps": min(config.warmup_ratio, 1 - 1e-9),
        "gradient_checkpointing": config.gradient_checkpointing,
        "report_to": config.report_to,
        "seed": seed,
        "bf16": on_gpu and dtype == "bfloat16",
        "fp16": on_gpu and dtype == "float16",
        "use_cpu": not on_gpu,
        # TRL's default of 1024 would cut image tokens.
        "max_length": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": not (bar and sys.stderr.isatty()),
        "remove_unused_columns": False,
        "dataloader_pin_memory": on_gpu,
    }


def lora_config(lora: LoraSettings, target_modules: str | None = None) -> Any:
    """Makes PEFT's form of the LoRA settings (the paper's adapters: plain LoRA, no bias)."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target_modules or lora.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _image_dataset(count: int, row: Callable[[int], dict[str, Any]]) -> Any:
    """Makes a ``datasets.Dataset`` whose rows are made when they are read.

    Args:
        count: How many rows there are.
        row: Makes the row of a number; it reads the image.
    """
    from datasets import Dataset

    return Dataset.from_dict({"row": list(range(count))}).with_transform(_Rows(row))


class _Rows:
    """The transform behind `_image_dataset`.

    The datasets library pickles a transform to name its cache, and copies it; the images behind
    this one shall be neither pickled nor copied.
    """

    def __init__(self, row: Callable[[int], dict[str, Any]]) -> None:
        self.row = row

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows = [self.row(number) for number in batch["row"]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Rows, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> _Rows:
        return self


def _within_context(model: Any, processor: Any, rows: Sequence[Row]) -> list[Row]:
    """Keeps the rows whose prompt, image and longest response fit into the model's context.

    Raises:
        UserError: None fits.
    """
    limit = model.config.get_text_config().max_position_embeddings
    encode = processor.tokenizer.encode
    kept = []
    for row in rows:
        width, height = row.image().size
        # The prompt's own placeholder counts as one token already.
        length = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        tokens = length.num_image_tokens[0] - 1 + len(encode(row.prompt, add_special_tokens=False))
        tokens += max(len(encode(t, add_special_tokens=False)) for t in row.responses.values())
        if tokens <= limit:
            kept.append(row)
    if not kept:
        raise UserError(
            f"None of {len(rows)} training samples fits into the model's {limit} tokens.",
            "Give at least one sample, or a model with a longer context.",
        )
    return kept


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lets transformers, TRL and datasets speak of errors only, and draw no bars of their own."""
    import datasets
    from transformers.utils import logging

    before = logging.get_verbosity()
    bars = datasets.utils.logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # TRL 1.16 sets arguments that transformers 5.23 calls deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            datasets.enable_progress_bars()


def progress_callbacks(progress: Progress | None) -> list[Any]:
    """Makes the trainer's callbacks: one that tells ``progress`` of every optimiser step."""
    from transformers import TrainerCallback

    if progress is None:
        return []
    tell = progress

    class Tell(TrainerCallback):  # type: ignore[misc]  # transformers is read without types
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            tell(state.global_step, state.max_steps)

    return [Tell()]


def train(trainer: Any, *, samples: int, skipped: int) -> TrainingOutcome:
    """Runs a trainer to its end, without the lines that it would print.

    Args:
        trainer: The trainer.
        samples: Samples it trains on.
        skipped: Samples left out before.

    Returns:
        What it did.
    """
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    loss = step_figures(trainer, "loss")
    return TrainingOutcome(
        steps=trainer.state.global_step,
        samples=samples,
        skipped=skipped,
        first_loss=final_mean(loss[::-1]),
        last_loss=final_mean(loss),
        seconds=seconds,
    )


def step_figures(trainer: Any, name: str) -> list[float]:
    """Lists a logged figure of every optimiser step, in order."""
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def final_mean(values: Sequence[float]) -> float:
    """Means the last `FINAL_STEPS` values, but no more than a quarter of them."""
    last = values[-max(1, min(FINAL_STEPS, len(values) // 4)) :]
    return sum(last) / len(last)


def _save_adapter(trainer: Any, base: ModelConfig, folder: Path) -> None:
    """Writes the trained adapter (safetensors) and names its base model.

    Args:
        trainer: The trainer, with a ``PeftModel``.
        base: The policy's base.
        folder: The folder to write.
    """
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.peft_config["default"].base_model_name_or_path = base.path
    # "auto" would ask the hub about the base model's vocabulary.
    model.save_pretrained(folder, save_embedding_layers=False)
    # PEFT's card is a form to be filled in.
    (folder / "README.md").unlink(missing_ok=True)
