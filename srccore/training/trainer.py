"""What rationale tuning, R-Scorer and DPO have in common: fine-tuning with TRL.

Several processes train data-parallel if they were started together (`ranks`), and an interrupted
training resumes from its newest checkpoint (`resume`); neither changes the result. Nothing is
truncated: a sample longer than the model's context is skipped and counted. Images are read batch
by batch, so memory does not grow with the data set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srccore.config import (
    LoraSettings,
    ModelConfig,
    OptimizerSettings,
    PolicyTrainingSettings,
)
from srccore.data.records import Candidate
from srccore.errors import UserError
from srccore.hashing import stable_hash
from srccore.method.engine import Work
from srccore.models.device import open_device
from srccore.models.families import language_model_targets
from srccore.models.policy import (
    Policy,
    drawn_text,
    load_policy,
    prompt_text,
    prompt_tokens,
    response_text,
)
from srccore.training.machine import Machine
from srccore.training.ranks import Processes, joined, local_share
from srccore.training.resume import CHECKPOINTS, Checkpoints, Timetable, step_callback

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ImageLoader",
    "Row",
    "Session",
    "TrainingOutcome",
    "final_mean",
    "longest_first",
    "lora_config",
    "sample_order",
    "step_figures",
    "train_adapter",
    "training",
]

ImageLoader = Callable[[], "Image"]
"""Reads one image (RGB); called once per epoch, and to get its size where `Row.size` is None."""

FINAL_STEPS = 10
"""A figure "at the end" is the mean over this many last steps, or the last quarter if fewer."""


@dataclass(frozen=True)
class Row:
    """What a policy is trained on: a question about an image, and one or two responses."""

    question: str
    responses: dict[str, str | Candidate]
    """By TRL's column names. A candidate is trained as it was drawn."""
    image: ImageLoader
    size: tuple[int, int] | None = None
    """Width and height of the image; if None, it is decoded to learn them."""


@dataclass(frozen=True)
class TrainingOutcome:
    """Result of a training run."""

    steps: int
    """Optimiser steps."""
    samples: int
    """Samples trained on."""
    skipped: int
    """Samples longer than the model's context."""
    first_loss: float
    """Mean over the first steps, over as many as for `last_loss`."""
    last_loss: float
    seconds: float
    """Of training only, without loading; of the last attempt if it was interrupted."""
    work: Work
    """What all processes computed in the last attempt; forward passes, not those backward."""
    gpus: int
    """GPUs that trained together; 0 on a CPU."""


@dataclass(frozen=True)
class Session:
    """A training, as seen from one of its processes.

    Attributes:
        arguments: The keyword arguments that ``SFTConfig`` and ``DPOConfig`` share. They expect a
            data set in `sample_order`, which is read once from start to end.
        device: The device of this process.
        processes: The processes that train together.
        checkpoints: Where to keep checkpoints.
        callback: The trainer's callback for every optimiser step.
    """

    arguments: dict[str, Any]
    device: str
    processes: Processes
    checkpoints: Checkpoints
    callback: Any

    def run(self, trainer: Any, *, samples: int, skipped: int) -> TrainingOutcome:
        """Runs a trainer to its end, from its newest checkpoint, without the lines it would print.

        Args:
            trainer: The trainer, of a class made by `resumable`.
            samples: The number of samples it trains on.
            skipped: The number of samples already left out.

        Returns:
            The result.
        """
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self.callback)
        trainer.checkpoints, trainer.processes = self.checkpoints, self.processes
        newest = self.checkpoints.newest() if self.processes.is_first else None
        step = self.processes.from_first(newest or 0)
        if step and self.processes.is_first:
            print(f"Training resumes from step {step}.", file=sys.stderr)
        began = time.monotonic()
        resumed = str(self.checkpoints.bring(step)) if step else None
        with _of_image_workers():
            trainer.train(resume_from_checkpoint=resumed)
        seconds = time.monotonic() - began
        loss = step_figures(trainer, "loss")
        return TrainingOutcome(
            steps=trainer.state.global_step,
            samples=samples,
            skipped=skipped,
            first_loss=final_mean(loss[::-1]),
            last_loss=final_mean(loss),
            seconds=seconds,
            work=Work(*self.processes.total(dataclasses.astuple(trainer.counted()))),
            gpus=self.processes.count if self.device.startswith("cuda") else 0,
        )


@contextlib.contextmanager
def _of_image_workers() -> Iterator[None]:
    """Turns what torch makes of an error in a process that reads images back into that error.

    Raises:
        UserError: An image cannot be read.
    """
    try:
        yield
    except RuntimeError as error:
        # A traceback in text, which ends with the error.
        name = f"{UserError.__module__}.{UserError.__qualname__}: "
        _, found, message = str(error).rpartition(name)
        if not found or not str(error).startswith("Caught UserError in DataLoader worker"):
            raise
        raise UserError(message.strip(), "") from None


@contextlib.contextmanager
def training(
    config: OptimizerSettings, out: Path, *, dtype: str, seed: int, machine: Machine
) -> Iterator[Session]:
    """Joins the other processes of a training, and silences the libraries meanwhile.

    Args:
        config: The stage's section of the preset.
        out: An existing folder. What the trainer writes below it is removed at the end.
        dtype: The checkpoint's; only used on a GPU.
        seed: Seeds adapter, order and dropout.
        machine: How to train; progress counts optimiser steps.

    Yields:
        The training.

    Raises:
        UserError: The processes cannot share a batch evenly, or a GPU is missing.
    """
    device = open_device(machine.device)
    with (
        joined(device) as processes,
        _quiet(),
        tempfile.TemporaryDirectory(dir=out, prefix=".trainer-", suffix=".tmp") as scratch,
    ):
        yield Session(
            arguments=_arguments(config, Path(scratch), seed, device, dtype, processes),
            device=_own_device(device),
            processes=processes,
            checkpoints=machine.checkpoints or Checkpoints(out / CHECKPOINTS),
            callback=step_callback(
                Timetable(config.checkpoint_minutes), seed, processes, machine.progress
            ),
        )


def train_adapter(
    policy: Policy,
    rows: Sequence[Row],
    config: PolicyTrainingSettings,
    out: Path,
    *,
    seed: int,
    machine: Machine,
    trainer: Callable[..., Any],
) -> tuple[TrainingOutcome, Any]:
    """Trains a new LoRA adapter on a policy; the first process writes it to ``out/adapter``.

    The adapter, the order of the rows and dropout are seeded by the run's seed and the number of
    adapters that the policy has, so that no round starts from the A of another. Only the adapter
    drops out units (reconstruction).

    Args:
        policy: The policy to start from; trained in float32 on a CPU.
        rows: What to learn from.
        config: The stage's section of the preset.
        out: An existing folder.
        seed: Seeds adapter, order and dropout.
        machine: How to train; progress counts optimiser steps.
        trainer: Makes a trainer of `resumable` from TRL's arguments as a dict and from keyword
            arguments.

    Returns:
        The result, and the trainer with its log.

    Raises:
        UserError: No row fits into the context, or the policy cannot be loaded.
    """
    from datasets import Dataset

    if policy.adapters:
        # numpy takes seeds of 32 bits.
        seed = stable_hash(f"{seed}/adapter-{len(policy.adapters)}") % 2**32
    with training(config, out, dtype=policy.base.dtype, seed=seed, machine=machine) as session:
        dtype = policy.base.dtype if session.device.startswith("cuda") else "float32"
        base = policy.base.model_copy(update={"dtype": dtype})
        loaded = load_policy(policy.model_copy(update={"base": base}), session.device)
        targets = language_model_targets(loaded.model, config.lora.target_modules)
        _switch_dropout_off(loaded.model)
        fitting = _within_context(loaded.model, loaded.processor, rows)
        order = longest_first(
            sample_order(len(fitting), config, seed),
            [columns["tokens"] for columns, _ in fitting],
            config.batch_size * config.gradient_accumulation_steps,
        )
        agreed = itertools.chain([str(policy.base.revision)], (str(row) for row, _ in fitting))
        session.processes.agree(agreed, "samples or revisions of the model")
        if config.image_workers:
            # The tokenizers library warns on stderr that its threads do not survive a fork.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        ready = trainer(
            {**session.arguments, **_image_workers(config)},
            model=loaded.model,
            train_dataset=Dataset.from_dict({"row": order}).with_transform(_Rows(fitting)),
            processing_class=loaded.processor,
            peft_config=lora_config(config.lora, targets),
        )
        outcome = session.run(ready, samples=len(fitting), skipped=len(rows) - len(fitting))
        if session.processes.is_first:
            _save_adapter(ready, policy.base, out / "adapter")
    return outcome, ready


def sample_order(count: int, config: OptimizerSettings, seed: int) -> list[int]:
    """Lists the order of the samples over all epochs.

    Each epoch is a new permutation. Its last batch is filled up from its start: all batches are
    full, so no sample weighs more because of how a batch is divided and accumulated.

    Args:
        count: The number of samples.
        config: The stage's section of the preset.
        seed: The run's seed.

    Returns:
        Indices of samples, as many as all optimiser steps take.
    """
    import torch

    batch = config.batch_size * config.gradient_accumulation_steps
    steps = math.ceil(count / batch)
    order: list[int] = []
    for epoch in range(math.ceil(config.epochs)):
        generator = torch.Generator().manual_seed(seed + epoch)
        shuffled = torch.randperm(count, generator=generator).tolist()
        order += itertools.islice(itertools.cycle(shuffled), steps * batch)
    return order[: math.ceil(config.epochs * steps) * batch]


def longest_first(order: Sequence[int], tokens: Sequence[int], batch: int) -> list[int]:
    """Sorts the samples of each optimiser step by length, so that forward passes are padded less.

    Which of its passes a sample is in does not change a step, apart from rounding.

    Args:
        order: Indices of samples, a multiple of ``batch``.
        tokens: The length of each sample.
        batch: Samples of a step.

    Returns:
        The same samples, with the same ones in each step.
    """
    steps = (order[start : start + batch] for start in range(0, len(order), batch))
    return [each for step in steps for each in sorted(step, key=lambda each: -tokens[each])]


def _own_device(device: str) -> str:
    """Returns the device of this process: its own GPU if several processes train together.

    Raises:
        UserError: One process sees several GPUs, which TRL does not support.
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


def _arguments(
    config: OptimizerSettings, out: Path, seed: int, device: str, dtype: str, processes: Processes
) -> dict[str, Any]:
    """Makes `Session.arguments`; nothing that the trainer writes into ``out`` is kept."""
    samples, passes = local_share(config, processes.count)
    if "tensorboard" in config.report_to:
        # The trainer's own folder is removed at the end, but the curves are to be kept.
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(out.parent / "tensorboard"))
    on_gpu = device.startswith("cuda")
    return {
        "output_dir": str(out),
        "learning_rate": config.learning_rate,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": samples,
        "gradient_accumulation_steps": passes,
        # Every trained weight takes part in every forward pass.
        "ddp_find_unused_parameters": False,
        # A float below 1 is a fraction of all steps.
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
        # `step_callback` decides when to save.
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": on_gpu,
    }


def lora_config(lora: LoraSettings, targets: str) -> Any:
    """Makes PEFT's LoRA settings (like the paper's adapters: plain LoRA, no bias).

    Args:
        lora: The settings.
        targets: The pattern of the trained modules where the settings name none.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or targets,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _switch_dropout_off(model: Any) -> None:
    """Trains a checkpoint without its own dropout: DPO's reference would drop out units, too."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # transformers' attention modules have a number instead.
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


class _Rows:
    """A transform of a data set of row numbers, which reads a row's image when the row is read.

    The datasets library pickles a transform to name its cache, and copies it; the images behind
    this one must be neither pickled nor copied.
    """

    def __init__(self, rows: Sequence[tuple[dict[str, Any], ImageLoader]]) -> None:
        self.rows = rows

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows = [self.rows[number] for number in batch["row"]]
        columns = {name: [values[name] for values, _ in rows] for name in rows[0][0]}
        return {**batch, **columns, "images": [[image()] for _, image in rows]}

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Rows, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> _Rows:
        return self


def _within_context(
    model: Any, processor: Any, rows: Sequence[Row]
) -> list[tuple[dict[str, Any], ImageLoader]]:
    """Writes prompts and responses, and keeps what fits into the model's context.

    Returns:
        The columns of each row that fits, and its image. Besides the texts, ``drawn`` has the
        log-probability of each response as it was drawn, or NaN: of a text of other origin, or one
        that is encoded in another number of tokens than it was drawn in. ``tokens`` is the row's
        length.

    Raises:
        UserError: No row fits.
    """
    limit = model.config.get_text_config().max_position_embeddings
    encode = processor.tokenizer.encode
    kept = []
    for row in rows:
        prompt = prompt_text(processor, row.question)
        responses = {name: _text(processor, said) for name, said in row.responses.items()}
        tokens = prompt_tokens(processor, prompt, row.size or row.image().size)
        counts = [len(encode(text, add_special_tokens=False)) for text in responses.values()]
        if tokens + max(counts) <= limit:
            columns: dict[str, Any] = {"prompt": prompt, **responses}
            columns["drawn"] = list(map(_log_probability, row.responses.values(), counts))
            columns["tokens"] = tokens + sum(counts)
            kept.append((columns, row.image))
    if not kept:
        raise UserError(
            f"None of {len(rows)} training samples fits into the model's context of {limit} "
            "tokens.",
            "Pass at least one sample that fits, or use a model with a longer context.",
        )
    return kept


def _text(processor: Any, said: str | Candidate) -> str:
    if isinstance(said, str):
        return response_text(processor, said)
    if said.drawn is None:
        return response_text(processor, said.text)
    return drawn_text(processor, said.drawn)


def _log_probability(said: str | Candidate, count: int) -> float:
    """The log-probability of a response as it was drawn; NaN if it is encoded as another."""
    if isinstance(said, str) or said.drawn is None or said.token_count != count:
        return math.nan
    return said.log_probability


def _image_workers(config: PolicyTrainingSettings) -> dict[str, Any]:
    """The trainer's arguments for processes that read images: forked, since rows are no pickle."""
    if not config.image_workers:
        return {}
    return {
        "dataloader_num_workers": config.image_workers,
        "dataloader_multiprocessing_context": "fork",
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Limits the output of transformers, TRL and datasets to errors, without progress bars."""
    import datasets
    from transformers.utils import logging

    before = logging.get_verbosity()
    bars = datasets.utils.logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # TRL 1.16 sets arguments that are deprecated in transformers 5.23.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            datasets.enable_progress_bars()


def step_figures(trainer: Any, name: str) -> list[float]:
    """Lists the values of a logged figure, one per optimiser step, in order."""
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def final_mean(values: Sequence[float]) -> float:
    """Averages the last `FINAL_STEPS` values, but no more than a quarter of them."""
    last = values[-max(1, min(FINAL_STEPS, len(values) // 4)) :]
    return sum(last) / len(last)


def _save_adapter(trainer: Any, base: ModelConfig, folder: Path) -> None:
    """Writes the trained adapter (safetensors) and records its base model.

    Args:
        trainer: The trainer, with a ``PeftModel``.
        base: The policy's base.
        folder: The folder to write.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.peft_config["default"].base_model_name_or_path = base.path
    # "auto" would query the hub for the base model's vocabulary.
    model.save_pretrained(folder, save_embedding_layers=False)
    # PEFT's card is an unfilled template.
    (folder / "README.md").unlink(missing_ok=True)
