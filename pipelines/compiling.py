"""Compiles the pipeline of a configuration and a profile to the YAML that Kubeflow runs."""

from __future__ import annotations

import itertools
import re
import tempfile
from pathlib import Path
from typing import Any

import srccore
from srccore.config import RunConfig, Section
from srccore.errors import UserError
from srccore.images import Images
from srccore_pipelines.profile import Profile

__all__ = ["COMPILED", "arguments_of", "compile_pipeline", "description_of"]

COMPILED = Path(__file__).parent / "compiled"
"""The shipped pipelines, one per preset."""
SECTIONS = tuple(
    name
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
)


def description_of(config: RunConfig, profile: Profile) -> str:
    """What a compiled pipeline says of itself: first of all, which release made it."""
    return (
        f"srccore {srccore.__version__}, preset {config.name}: Self-Rationale Calibration, "
        f"{profile.rounds} rounds, {profile.shards} shards"
    )


def arguments_of(config: RunConfig) -> dict[str, Any]:
    """A configuration as the pipeline's run-time parameters.

    Args:
        config: The run.

    Returns:
        Arguments by parameter; what is fixed by compiling is not among them.
    """
    dumped = config.model_dump(mode="json", exclude_none=True)
    return {
        "seed": config.seed,
        "device": config.device,
        "threads": config.threads or 0,
        **{name: dumped[name] for name in SECTIONS},
    }


def _keep_parameters(pipeline: Any, profile: Profile) -> None:
    """Drops parameters that the profile has no use for; those it needs lose their default."""
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


def compile_pipeline(config: RunConfig, profile: Profile, images: Images) -> str:
    """Compiles a pipeline.

    Args:
        config: Gives the run-time parameters their defaults.
        profile: What is fixed.
        images: What the pods run.

    Returns:
        The YAML: the pipeline and its Kubernetes part.

    Raises:
        UserError: The configuration asks for what a pipeline cannot do, or an image lacks a
            digest.
    """
    if config.on_regression != "continue":
        raise UserError(
            f"on_regression: {config.on_regression} is for srccore run; a pipeline cannot go back "
            "to an earlier policy.",
            "Compile with --set on_regression=continue.",
        )
    from kfp import compiler

    from srccore_pipelines.pods import Pods
    from srccore_pipelines.src_pipeline import make_pipeline

    slug = re.sub(r"[^a-z0-9]+", "-", config.name.lower()).strip("-")
    pipeline = make_pipeline(
        Pods(profile, images),
        name=f"src-{slug}",
        title=config.name,
        description=description_of(config, profile),
    )
    _keep_parameters(pipeline, profile)
    training = profile.resources("train-dpo")
    defaults = {
        **arguments_of(config),
        "node_selector": dict(profile.node_selector),
        "tolerations": [each.model_dump(exclude_none=True) for each in profile.tolerations],
        "training_memory": training.memory,
        "training_gpus": str(training.gpus),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path), pipeline_parameters=defaults)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # kfp's comments list the defaults in another order every time.
    body = "".join(itertools.dropwhile(lambda line: line.startswith("#"), lines))
    return f"# {description_of(config, profile)}\n{body}"
