"""``srccore compile`` and ``srccore pipeline-local``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from srccore.images import DEFAULT_REGISTRY

__all__ = ["compile_command", "pipeline_local_command"]

Preset = Annotated[
    str, typer.Option("--preset", help="A preset's name (see srccore presets) or a YAML file.")
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        default_factory=list,
        show_default=False,
        help="Override a setting by its dotted name: --set search.width=6.",
    ),
]


def compile_command(
    out: Annotated[Path, typer.Option("-o", "--out", help="The YAML file to write.")],
    overrides: Overrides,
    preset: Preset = "tiny",
    profile: Annotated[
        Path | None, typer.Option(help="A YAML file: what pods ask for on your cluster.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds; the preset's by default.")] = None,
    shards: Annotated[
        int | None, typer.Option(help="Pods that search and score a round side by side.")
    ] = None,
    registry: Annotated[
        str, typer.Option(help="Where the images are: registry.example.com/team.")
    ] = DEFAULT_REGISTRY,
    tag: Annotated[str | None, typer.Option(help="Their tag; this release's by default.")] = None,
    digests: Annotated[
        Path | None,
        typer.Option(help="The list of srccore images push: name images by digest."),
    ] = None,
) -> None:
    """Compile the pipeline for Kubeflow.

    Settings of the method become defaults of run-time parameters; rounds, shards, images and what
    pods ask for are fixed in the file.
    """
    import srccore
    from srccore.config import load_config
    from srccore.images import Images, read_digests
    from srccore_pipelines.compiling import compile_pipeline
    from srccore_pipelines.profile import load_profile

    config = load_config(preset, overrides)
    images = Images(
        registry=registry,
        tag=tag or srccore.__version__,
        digests=read_digests(digests, registry) if digests else {},
    )
    text = compile_pipeline(
        config, load_profile(profile, config, rounds=rounds, shards=shards), images
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    typer.echo(out)
