"""Compiles the pipeline of a configuration and a profile to YAML for Kubeflow."""

from __future__ import annotations

import ast
import itertools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import srccore
from srccore.config import RunConfig
from srccore.containers.names import Images
from srccore.errors import UserError
from srccore.kubeflow.package import refuse_secrets
from srccore.pipelines.profile import Profile
from srccore.stages.table import STAGES
from srccore.training.ranks import local_share

__all__ = [
    "COMPILED",
    "arguments_of",
    "compile_pipeline",
    "description_of",
    "device_warning",
    "share_warnings",
    "size_warning",
    "stages_on_vllm",
]

COMPILED = Path(__file__).parent / "compiled"
"""The shipped pipelines, one for each preset."""
RECORD_BYTES = 1024 * 1024
"""The default size limit of Argo's record of a run."""
RUN_BYTES, ROUND_BYTES, SHARD_BYTES = 140_000, 77_000, 10_000
"""What takes up that record: the run itself, each round with one shard, and each further shard of
a round (docs/kubeflow-run.md)."""
SECTIONS = tuple(
    name
    for name in RunConfig.model_fields
    if any(name in stage.sections.values() for stage in STAGES.values())
)


def description_of(config: RunConfig, profile: Profile) -> str:
    """The description of a compiled pipeline, which starts with the release that compiled it."""
    return (
        f"srccore {srccore.__version__}, preset {config.name}: Self-Rationale Calibration, "
        f"{profile.rounds} rounds, {profile.shards} shards"
    )


def arguments_of(config: RunConfig) -> dict[str, Any]:
    """A configuration as the pipeline's run-time parameters.

    Args:
        config: The configuration of the run.

    Returns:
        The arguments by parameter, without the settings that are fixed by compiling.
    """
    dumped = config.model_dump(mode="json", exclude_none=True)
    return {
        "seed": config.seed,
        "device": config.device,
        "threads": config.threads or 0,
        **{name: dumped[name] for name in SECTIONS},
    }


def stages_on_vllm(config: RunConfig) -> frozenset[str]:
    """Returns the stages whose engine is vLLM."""
    sections = dict(config)
    return frozenset(
        name
        for name, stage in STAGES.items()
        if stage.engine and sections[stage.engine].engine.name == "vllm"
    )


def size_warning(profile: Profile) -> str | None:
    """The warning about a pipeline whose runs may outgrow Argo's record of a run, if any.

    Args:
        profile: The profile that the pipeline was compiled with.
    """
    safe = 0.9 * RECORD_BYTES - RUN_BYTES - profile.rounds * ROUND_BYTES
    fitting = int(1 + safe / (profile.rounds * SHARD_BYTES))
    if profile.shards <= fitting:
        return None
    return (
        f"Warning: {profile.rounds} rounds of {profile.shards} shards may be too many for one run: "
        "Argo keeps a run in one object of 1 MiB, and fails a run that outgrows it. "
        f"Use {f'{fitting} shards' if fitting > 0 else 'fewer rounds'}, or raise "
        "MAX_WORKFLOW_SIZE of Argo's controller (docs/kubeflow-run.md)."
    )


def device_warning(config: RunConfig, profile: Profile) -> str | None:
    """The warning about GPUs that are requested and not used, if any.

    Args:
        config: The configuration of the run.
        profile: The profile that the pipeline was compiled with.
    """
    stages = profile.gpu_stages()
    if config.device != "cpu" or not stages:
        return None
    return (
        f"Warning: the profile requests GPUs for {', '.join(stages)}, but the preset "
        f"{config.name} runs on the CPU. Pass --set device=cuda, or set gpus to 0."
    )


def _keep_parameters(pipeline: Any, profile: Profile) -> None:
    """Drops the parameters that the profile does not use, and the defaults of those it requires."""
    needed = {
        "labelled_pairs_uri": profile.scorer == "train-on-given-pairs",
        "scorer_uri": profile.scorer == "given",
    }
    parameters = pipeline.pipeline_spec.root.input_definitions.parameters
    for name, is_needed in needed.items():
        if is_needed:
            parameters[name].ClearField("default_value")
            parameters[name].is_optional = False
        else:
            del parameters[name]


def _drop_descriptions(pipeline: Any) -> None:
    """Drops the descriptions of components; ``component.yaml`` and the pages keep them.

    For each task, Kubeflow copies the definition of its component into nine nodes of the run's
    record, whose size is limited. The descriptions are a quarter of it (docs/kubeflow-run.md).
    """
    for component in pipeline.pipeline_spec.components.values():
        for definitions in (component.input_definitions, component.output_definitions):
            for each in (*definitions.artifacts.values(), *definitions.parameters.values()):
                each.ClearField("description")
    for executor in pipeline.pipeline_spec.deployment_spec["executors"].values():
        if "container" in executor:
            command = executor["container"]["command"]
            command[len(command) - 1] = _without_docstring(command[len(command) - 1])


def _without_docstring(source: str) -> str:
    """The source of a module, without the docstring of its only function."""
    (function,) = (each for each in ast.parse(source).body if isinstance(each, ast.FunctionDef))
    docstring, first, *_ = function.body
    lines = source.splitlines(keepends=True)
    return "".join([*lines[: docstring.lineno - 1], *lines[first.lineno - 1 :]])


def share_warnings(config: RunConfig, profile: Profile) -> Iterator[str]:
    """The warnings about training jobs that would be refused, since they cannot share their batch.

    Args:
        config: The configuration of the run, whose batches are parameters of the pipeline.
        profile: The profile that the pipeline was compiled with.
    """
    for stage in filter(profile.is_job, STAGES):
        processes = profile.training_job.pods * max(1, profile.resources(stage).gpus)
        try:
            local_share(getattr(config, STAGES[stage].sections["config"]), processes)
        except UserError as error:
            yield f"Warning: {stage} would be refused: {error}"


def compile_pipeline(config: RunConfig, profile: Profile, images: Images) -> str:
    """Compiles a pipeline.

    Args:
        config: The defaults of the run-time parameters.
        profile: The settings that are fixed.
        images: The images of the pods.

    Returns:
        The YAML: the pipeline, and its settings for Kubernetes.

    Raises:
        UserError: The configuration requires something that a pipeline cannot do, an image has no
            digest, or a text could have a secret in it.
    """
    if config.on_regression != "continue":
        raise UserError(
            f"on_regression: {config.on_regression} only works with srccore run: a pipeline cannot "
            "go back to an earlier policy.",
            "Compile with --set on_regression=continue.",
        )
    on_vllm = stages_on_vllm(config)
    for stage in sorted(on_vllm):
        if not profile.resources(stage).gpus:
            raise UserError(
                f"The engine of {stage} is vLLM, whose image is for GPUs, and the profile requests "
                "none for its pods.",
                "Set gpus in the profile, or compile with --set "
                f"{STAGES[stage].engine}.engine.name=transformers.",
            )
    from kfp import compiler

    from srccore.pipelines.pods import Pods
    from srccore.pipelines.src_pipeline import make_pipeline

    slug = re.sub(r"[^a-z0-9]+", "-", config.name.lower()).strip("-")
    pipeline = make_pipeline(
        Pods(profile, images, on_vllm),
        name=f"src-{slug}",
        title=config.name,
        description=description_of(config, profile),
    )
    _keep_parameters(pipeline, profile)
    _drop_descriptions(pipeline)
    training = profile.resources("train-dpo")
    device = "cuda" if config.device == "auto" and profile.gpu_stages() else config.device
    defaults = {
        **arguments_of(config),
        "device": device,
        "node_selector": dict(profile.node_selector),
        "tolerations": [each.model_dump(exclude_none=True) for each in profile.tolerations],
        "training_memory": training.memory,
        "training_gpus": str(training.gpus),
    }
    refuse_secrets({**defaults, "environment": profile.environment})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path), pipeline_parameters=defaults)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # kfp's comments list the defaults in a different order every time.
    body = "".join(itertools.dropwhile(lambda line: line.startswith("#"), lines))
    return f"# {description_of(config, profile)}\n{body}"
