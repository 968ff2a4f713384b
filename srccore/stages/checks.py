"""What can be refused before any work starts, with the same rule and words wherever it is checked.

`srccore run`, `srccore submit` and every step check settings here before they do anything;
`srccore compile` reports the same as a warning, since a setting can still be given at submission.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from srccore.config import EndpointConfig, RunConfig
from srccore.data.records import Sample
from srccore.errors import UserError
from srccore.files import MANIFEST
from srccore.stages.inputs import source_samples
from srccore.stages.table import STAGES
from srccore.stages.workers import visible_gpus

__all__ = [
    "check_data",
    "check_device",
    "check_facts",
    "check_gpus",
    "check_settings",
    "check_training_processes",
    "gpus_of_worker",
]


def check_data(config: RunConfig) -> None:
    """Refuses a data set that lacks what the teachers of a run need.

    Raises:
        UserError: A teacher has nothing to go by, or there is no such data set.
    """
    if config.data.source != "embedded":
        samples = source_samples(config.data)
        check_facts("augment-rationales", config.augmentation, samples, config.data.source)
        check_facts("annotate-ratings", config.annotation, samples, config.data.source)


def check_settings(stages: Iterable[str], sections: Mapping[str, Any]) -> None:
    """Refuses stages that would ask an endpoint whose address or model is not set.

    Args:
        stages: Names of the stages that are to run.
        sections: Sections of the configuration by name; those of other stages are ignored.

    Raises:
        UserError: An endpoint is incomplete.
    """
    for name in stages:
        stage = STAGES[name]
        name_of_section, _, choice = stage.teacher.partition(".")
        section = sections.get(name_of_section)
        if section is None or getattr(section, choice) != "endpoint":
            continue
        endpoint: EndpointConfig = section.endpoint
        where = f"{name_of_section}.endpoint"
        missing = [each for each in ("url", "model") if not getattr(endpoint, each)]
        if missing:
            raise UserError(
                f"{name} would ask an endpoint ({stage.teacher}), but "
                f"{' and '.join(f'{where}.{each}' for each in missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set.",
                f"Pass --set {where}.url=https://HOST/v1 and --set {where}.model=NAME, or do "
                f"without it: {stage.without_teacher}.",
            )
        if not str(endpoint.url).startswith(("http://", "https://")):
            raise UserError(
                f"{where}.url must start with http:// or https://, got {endpoint.url!r}.",
                f"Pass --set {where}.url=https://HOST/v1.",
            )


def check_device(stage: str, out: Path, device: str) -> None:
    """Says what a stage that runs a model is going to run on, before it reads anything.

    Args:
        stage: Its name.
        out: Its output folder; a finished stage needs no device.
        device: ``cpu``, ``cuda`` or ``auto``.

    Raises:
        UserError: There is no GPU where one was asked for.
    """
    if STAGES[stage].base == "models" and not (out / MANIFEST).exists():
        from srccore.models.device import open_device

        open_device(device)


def gpus_of_worker(config: RunConfig) -> int:
    """The GPUs that each worker of a run needs for itself; 0 if no stage runs on vLLM."""
    engines = [getattr(config, stage.engine).engine for stage in STAGES.values() if stage.engine]
    return max((each.tensor_parallel_size for each in engines if each.name == "vllm"), default=0)


def check_gpus(config: RunConfig, workers: int) -> None:
    """Refuses more workers than the GPUs have room for.

    Args:
        config: The run's configuration.
        workers: The workers of the run.

    Raises:
        UserError: vLLM would find too few GPUs, or one whose memory another worker has taken.
    """
    gpus, needed = len(visible_gpus(config.device)), workers * gpus_of_worker(config)
    if 0 < gpus < needed:
        raise UserError(
            f"--workers {workers} needs {needed} GPUs, {gpus_of_worker(config)} for each worker's "
            f"vLLM, but only {gpus} {'is' if gpus == 1 else 'are'} visible.",
            "Use fewer --workers, or a smaller engine.tensor_parallel_size.",
        )


def check_training_processes(processes: int | None, device: str) -> None:
    """Refuses to train with more processes than there are GPUs.

    Args:
        processes: The number that was asked for; None is one for each GPU.
        device: ``cpu``, ``cuda`` or ``auto``.

    Raises:
        UserError: Two processes would have to share a GPU, which NCCL does not support.
    """
    gpus = len(visible_gpus(device)) if processes else 0
    if processes and 0 < gpus < processes:
        raise UserError(
            f"--training-processes {processes} needs {processes} GPUs, but only {gpus} "
            f"{'is' if gpus == 1 else 'are'} visible.",
            "Use fewer --training-processes.",
        )


def check_facts(stage: str, section: Any, samples: Sequence[Sample], data: object) -> None:
    """Refuses the teacher ``facts`` where no sample has what it needs.

    Args:
        stage: The stage that would ask the teacher.
        section: Its section of the configuration.
        samples: The samples of its data set.
        data: The data set, for the error.

    Raises:
        UserError: No sample has facts, and for augment-rationales no rationale either.
    """
    if section.teacher != "facts" or not samples or any(sample.facts for sample in samples):
        return
    name = STAGES[stage].teacher.partition(".")[0]
    if stage == "augment-rationales" and any(sample.rationale for sample in samples):
        return
    raise UserError(
        f"{name}.teacher is facts, but no sample of {data} has facts.",
        f"Add the column facts, or use an endpoint: --set {name}.teacher=endpoint "
        f"--set {name}.endpoint.url=https://HOST/v1 --set {name}.endpoint.model=NAME.",
    )
