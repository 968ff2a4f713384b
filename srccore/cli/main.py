"""The command line: ``srccore ...``. A thin shell: every command calls one function.

Heavy packages are imported by the commands that need them, so that ``--help`` is fast.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import srccore
from srccore.cli import images, pipeline, runs, stage
from srccore.cli.options import Overrides, Preset, TrainingProcesses
from srccore.errors import UserError
from srccore.files import full_disk_explained
from srccore.shown import visible
from srccore.stopping import stoppable

__all__ = ["app", "main"]

GROUPS = {
    "Local": ("run", "report", "export", "stage", "pipeline-local", "presets"),
    "Kubeflow": ("compile", "submit", "schedule", "runs", "collect"),
    "Images and data": ("images", "data"),
}
"""The commands as ``srccore --help`` lists them."""


class _Grouped(TyperGroup):
    """Lists the commands in `GROUPS`, in plain text; Typer's own panels need rich."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes a section for each group, with one column of names throughout."""
        width = max(map(len, self.commands))
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [
                        (name.ljust(width), self.commands[name].get_short_help_str(limit=200))
                        for name in names
                    ]
                )


app = typer.Typer(
    name="srccore",
    cls=_Grouped,
    help="Self-Rationale Calibration: search, score, curate and align a vision-language model "
    "on its own rationales.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Example: srccore run --preset tiny --out runs/tiny",
)
data_app = typer.Typer(help="Check data sets.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")
app.add_typer(stage.app, name="stage")
app.add_typer(runs.runs_app, name="runs")
app.add_typer(images.app, name="images")

EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "trl", "peft", "accelerate", "datasets"), "train"),
    **dict.fromkeys(("kfp", "kfp_server_api", "croniter"), "pipelines"),
    **dict.fromkeys(("pyarrow", "PIL"), "data"),
    "kubernetes": "cluster",
    "openai": "teacher",
}
"""The extra that installs each package that may be missing."""


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"srccore {srccore.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Takes the options of ``srccore`` itself."""


@app.command("run", epilog="Example: srccore run --preset tiny --out runs/tiny --set rounds=4")
def run_command(
    out: Annotated[Path, typer.Option("--out", help="The run folder; created if missing.")],
    overrides: Overrides,
    preset: Preset = "tiny",
    seed: Annotated[int | None, typer.Option(help="The seed of the run.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The processes to divide the samples of a stage among; one for each GPU, or for "
            "every two CPU cores, if not set. The results do not depend on it.",
        ),
    ] = None,
    training_processes: TrainingProcesses = None,
) -> None:
    """Run all stages and rounds, or resume an interrupted run."""
    from srccore.config import load_config
    from srccore.run.console import ConsoleObserver, quiet_libraries
    from srccore.run.folder import RunFolder
    from srccore.run.loop import run
    from srccore.run.report.gather import write_report
    from srccore.stages.checks import gpus_of_worker
    from srccore.stages.workers import default_workers

    quiet_libraries()
    config = load_config(preset, [*overrides, *([f"seed={seed}"] if seed is not None else [])])
    observer = ConsoleObserver()
    workers = workers or default_workers(config.device, max(1, gpus_of_worker(config)))
    try:
        with contextlib.closing(observer):
            run(config, out, observer, workers, training_processes)
    except KeyboardInterrupt:
        observer.note(f"\nInterrupted. Run the same command to resume {out}.")
        raise typer.Exit(130) from None
    folder = RunFolder(out)
    if observer.worked or not folder.report.exists():
        write_report(out)
    else:
        observer.note("Nothing to do: the run has finished.")
    observer.note(f"Metrics: {folder.figures}\nReport:  {folder.report}")


app.command("report", epilog="Example: srccore report runs/tiny")(stage.report)


@app.command("export", epilog="Example: srccore export runs/tiny --round 3 -o exported")
def export_command(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write to.")],
    round_number: Annotated[
        int, typer.Option("--round", help="The round; 0 is the policy after stage 1.")
    ],
    adapter: Annotated[
        bool,
        typer.Option("--adapter", help="Write a single LoRA adapter instead of merged weights."),
    ] = False,
) -> None:
    """Write a round's policy as a plain transformers checkpoint."""
    from srccore.run.console import quiet_libraries
    from srccore.run.export import export_policy

    quiet_libraries()
    export_policy(run, round_number, out, adapter=adapter)
    typer.echo(out)


app.command(
    "compile",
    epilog="Example: srccore compile --preset llava-1.5-7b --shards 16 "
    "--registry registry.example.com/team -o src.yaml",
)(pipeline.compile_command)
app.command(
    "pipeline-local",
    epilog="Example: srccore pipeline-local --out runs/pipeline --set search.samples=50",
)(pipeline.pipeline_local_command)
app.command(
    "submit",
    epilog="Example: srccore submit src.yaml --artifact-root s3://bucket/src "
    "--host https://kubeflow.example.com/pipeline --wait",
)(runs.submit_command)
app.command(
    "schedule",
    epilog="Example: srccore schedule src.yaml --artifact-root s3://bucket/src --name weekly "
    '--cron "0 2 * * 0"',
)(runs.schedule_command)
app.command("collect", epilog="Example: srccore collect s3://bucket/src/report/3f9c -o runs/src")(
    pipeline.collect_command
)


@app.command("presets")
def presets_command() -> None:
    """List the presets."""
    from srccore.config import preset_names

    typer.echo("\n".join(preset_names()))


@data_app.command("validate", epilog="Example: srccore data validate data/train.parquet")
def validate_command(
    path: Annotated[
        Path, typer.Argument(help="A .parquet or .jsonl file, or a folder of one kind.")
    ],
) -> None:
    """Check every row of a data set and list the invalid ones."""
    from srccore.data.dataset import validate

    report = validate(path)
    for problem in report.problems:
        name = f" ({problem.id!r})" if problem.id else ""
        typer.echo(visible(f"row {problem.row}{name}: {problem.reason}"))
    counts = ", ".join(f"{name} {count}" for name, count in report.by_category.items())
    found = len(report.problems)
    problems = "1 problem" if found == 1 else f"{found} problems"
    typer.echo(f"{report.rows} rows: {counts or 'none'}; {problems}")
    if report.problems:
        raise typer.Exit(2)


def main() -> None:
    """Runs the command line; a `UserError` is printed as one paragraph, with exit code 2.

    SIGTERM ends it with 143, Ctrl-C ends ``srccore run`` with 130.
    """
    try:
        with stoppable(), full_disk_explained():
            app()
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name or "")
        if extra is None:
            raise
        typer.echo(
            f"Error: This command needs {error.name}, which is not installed. "
            f"Install it with pip install 'srccore[{extra}]'.",
            err=True,
        )
        sys.exit(2)
