"""``srccore compile``, ``srccore pipeline-local`` and ``srccore collect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from srccore.cli.options import Overrides, Parameters, Preset
from srccore.containers.names import DEFAULT_REGISTRY
from srccore.errors import UserError

__all__ = ["collect_command", "compile_command", "pipeline_local_command"]


def compile_command(
    out: Annotated[Path, typer.Option("-o", "--out", help="The YAML file to write.")],
    overrides: Overrides,
    preset: Preset = "tiny",
    profile: Annotated[
        Path | None, typer.Option(help="A YAML file with what pods request on your cluster.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="The number of rounds; the preset's by default.")
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(help="The number of pods that search and score each round in parallel."),
    ] = None,
    registry: Annotated[
        str, typer.Option(help="Where the images are: registry.example.com/team.")
    ] = DEFAULT_REGISTRY,
    tag: Annotated[
        str | None, typer.Option(help="The tag of the images; this release's by default.")
    ] = None,
    digests: Annotated[
        Path | None,
        typer.Option(help="The list written by srccore images push, to refer to images by digest."),
    ] = None,
) -> None:
    """Compile the pipeline for Kubeflow.

    Settings of the method become the defaults of run-time parameters. Rounds, shards, images and
    what pods request are fixed in the file.
    """
    import srccore
    from srccore.config import load_config
    from srccore.containers.names import Images, read_digests
    from srccore.files import atomically, writable
    from srccore.kubeflow.package import read_package
    from srccore.pipelines.compiling import (
        compile_pipeline,
        device_warning,
        share_warnings,
        size_warning,
    )
    from srccore.pipelines.profile import load_profile

    config = load_config(preset, overrides)
    images = Images(
        registry=registry,
        tag=tag or srccore.__version__,
        digests=read_digests(digests, registry) if digests else {},
    )
    fixed = load_profile(profile, config, rounds=rounds, shards=shards)
    text = compile_pipeline(config, fixed, images)
    with writable(out, "-o"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomically(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
    typer.echo(out)
    shares = share_warnings(config, fixed)
    for warning in (size_warning(fixed), device_warning(config, fixed), *shares):
        if warning is not None:
            typer.echo(warning, err=True)
    try:
        read_package(out).check_settings({})
    except UserError as error:
        typer.echo(f"Warning: set this now or when you submit: {error}", err=True)


def pipeline_local_command(
    out: Annotated[Path, typer.Option("--out", help="The folder to write to; created if missing.")],
    overrides: Overrides,
    parameters: Parameters,
    preset: Annotated[
        str, typer.Option("--preset", help="The preset whose shipped pipeline to run.")
    ] = "tiny",
    pipeline: Annotated[
        Path | None,
        typer.Option(help="A file written by srccore compile, instead of the shipped pipeline."),
    ] = None,
) -> None:
    """Run a compiled pipeline on this machine.

    Each task runs in a process of its own, as Kubeflow would run it in a pod. This is for trying
    out a pipeline; srccore run does the same work faster.
    """
    from srccore.config import preset_names
    from srccore.kubeflow.package import read_package
    from srccore.pipelines.compiling import COMPILED
    from srccore.pipelines.local import run_locally

    if pipeline is None and preset not in preset_names():
        raise UserError(
            f"There is no shipped pipeline {preset!r}.",
            f"Choose one of {', '.join(preset_names())}, or pass a compiled pipeline with "
            "--pipeline.",
        )
    package = read_package(pipeline or COMPILED / f"{preset}.yaml")
    package.refuse_jobs()
    arguments = package.arguments(str(out.resolve() / "artifacts"), overrides, parameters)
    package.check_settings(arguments)

    def say(line: str) -> None:
        typer.echo(line, err=True)

    try:
        page = run_locally(package.path, arguments, out, say)
    except KeyboardInterrupt:
        say(f"Interrupted. Run the same command to resume {out}.")
        raise typer.Exit(130) from None
    typer.echo(f"Report: {page}")


def collect_command(
    report: Annotated[
        str, typer.Argument(help="The folder ARTIFACT_ROOT/report/KEY of the pipeline's run.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The run folder to create.")],
) -> None:
    """Download a pipeline's run as a run folder.

    srccore report and srccore export work on it.
    """
    from srccore.steps.home import collect_report

    collect_report(report, out)
    typer.echo(out)
