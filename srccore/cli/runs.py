"""The commands against a Kubeflow Pipelines backend: ``srccore submit``, ``schedule``, ``runs``.

A thin shell: every command connects, calls one function and prints.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srccore.cli.options import Overrides, Parameters, with_connection
from srccore.errors import UserError
from srccore.kubeflow.connection import Connection

if TYPE_CHECKING:
    from srccore.kubeflow.client import Backend

__all__ = ["runs_app", "schedule_command", "submit_command"]

runs_app = typer.Typer(
    help="List, follow and stop runs on Kubeflow Pipelines.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

TIMED_OUT = 124
"""Exit code where --timeout is over, as of coreutils' timeout."""

File = Annotated[Path, typer.Argument(help="What srccore compile wrote.", show_default=False)]
ArtifactRoot = Annotated[
    str,
    typer.Option(metavar="URI", help="Where the run writes: s3://BUCKET/PREFIX."),
]
Experiment = Annotated[
    str | None, typer.Option(help="The experiment; the pipeline's name otherwise.")
]
ServiceAccount = Annotated[
    str | None, typer.Option(help="The pods' account; the backend's default otherwise.")
]
Cache = Annotated[
    bool,
    typer.Option(
        "--cache/--no-cache",
        help="Let Kubeflow take over tasks of earlier runs unseen; what lies finished under the "
        "artifact root is found in any case.",
    ),
]
Upload = Annotated[
    bool,
    typer.Option(
        "--upload",
        help="Keep the pipeline on Kubeflow, as a version of the pipeline of its name, for all to "
        "find and start from the UI.",
    ),
]
Wait = Annotated[
    bool,
    typer.Option(
        "--wait", help="Follow the run; exit with 0 if it succeeds, 1 if not, 124 on --timeout."
    ),
]
Interval = Annotated[
    float, typer.Option(min=0.01, metavar="SECONDS", help="Time between two looks.")
]
Timeout = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="How long to follow; the run goes on.")
]
Run = Annotated[str, typer.Argument(help="The run's id.", show_default=False)]


@with_connection
def submit_command(
    connection: Connection,
    pipeline: File,
    artifact_root: ArtifactRoot,
    overrides: Overrides,
    parameters: Parameters,
    run_name: Annotated[str | None, typer.Option(help="The run's display name.")] = None,
    experiment: Experiment = None,
    service_account: ServiceAccount = None,
    cache: Cache = True,
    upload: Upload = False,
    wait: Wait = False,
    interval: Interval = 10.0,
    timeout: Timeout = None,
) -> None:
    """Start a run of a compiled pipeline on Kubeflow Pipelines."""
    from srccore.kubeflow.client import connect
    from srccore.kubeflow.package import read_package, shared_root
    from srccore.kubeflow.runs import submit

    package = read_package(pipeline)
    arguments = package.arguments(shared_root(artifact_root), overrides, parameters)
    package.refuse_unreachable(arguments)
    backend = connect(connection)
    run = submit(
        backend,
        package,
        arguments,
        name=run_name,
        experiment=experiment,
        service_account=service_account,
        cache=cache,
        upload=upload,
    )
    typer.echo(f"Run {run.run_id}\n{backend.run_url(run.run_id)}")
    if upload:
        typer.echo(f"Pipeline: {backend.version_url(run.pipeline_version_reference)}")
    if wait:
        _follow(backend, connection, run.run_id, interval, timeout)
    else:
        typer.echo(f"Follow it: {_follow_it(connection, run.run_id)}")


@with_connection
def schedule_command(
    connection: Connection,
    pipeline: File,
    artifact_root: ArtifactRoot,
    name: Annotated[
        str, typer.Option(help="The schedule's name; an earlier one of that name is disabled.")
    ],
    cron: Annotated[
        str,
        typer.Option(
            metavar="LINE",
            help='Five fields as in a crontab, or six with seconds first: "0 2 * * 0".',
        ),
    ],
    overrides: Overrides,
    parameters: Parameters,
    experiment: Experiment = None,
    service_account: ServiceAccount = None,
    cache: Cache = True,
    upload: Upload = False,
) -> None:
    """Start runs of a compiled pipeline by the clock, one at a time, without catching up."""
    from srccore.kubeflow.client import connect
    from srccore.kubeflow.package import read_package, shared_root
    from srccore.kubeflow.schedule import next_times, read_cron, schedule

    line = read_cron(cron)
    package = read_package(pipeline)
    arguments = package.arguments(shared_root(artifact_root), overrides, parameters)
    package.refuse_unreachable(arguments)
    backend = connect(connection)
    made = schedule(
        backend,
        package,
        arguments,
        name=name,
        cron=line,
        experiment=experiment,
        service_account=service_account,
        cache=cache,
        upload=upload,
    )
    typer.echo(f"Schedule {made.id}\n{backend.schedule_url(made.id)}")
    if upload:
        typer.echo(f"Pipeline: {backend.version_url(made.version)}")
    for old in made.disabled:
        typer.echo(f"Disabled the earlier one of that name: {old}")
    times = ", ".join(f"{each:%a %Y-%m-%d %H:%M:%S}" for each in next_times(line, _now()))
    typer.echo(f"Next runs, where the backend's clock is UTC: {times}")


@runs_app.command("list")
@with_connection
def list_command(
    connection: Connection,
    experiment: Annotated[
        str | None, typer.Option(help="Only the runs of the experiment of this name.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most, newest first.")] = 20,
) -> None:
    """List the newest runs."""
    from srccore.kubeflow.client import connect
    from srccore.kubeflow.follow import duration
    from srccore.kubeflow.runs import list_runs

    backend = connect(connection)
    rows = [("ID", "NAME", "STATE", "CREATED (UTC)", "DURATION")]
    for row in list_runs(backend, experiment, limit):
        created = f"{row.created:%Y-%m-%d %H:%M}" if row.created else "-"
        took = duration(row.seconds) if row.seconds is not None else "-"
        rows.append((row.id, row.name, row.state, created, took))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for cells in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        typer.echo(line.rstrip())


@runs_app.command("status")
@with_connection
def status_command(
    connection: Connection,
    run: Run,
    wait: Wait = False,
    interval: Interval = 10.0,
    timeout: Timeout = None,
) -> None:
    """Show how far a run has come, or follow it."""
    from rich.console import Console

    from srccore.kubeflow.client import connect
    from srccore.kubeflow.follow import tree
    from srccore.kubeflow.runs import get_run

    backend = connect(connection, needs_namespace=False)
    if wait:
        _follow(backend, connection, run, interval, timeout)
        return
    Console(highlight=False).print(tree(get_run(backend, run)))
    typer.echo(backend.run_url(run))


@runs_app.command("stop")
@with_connection
def stop_command(
    connection: Connection,
    run: Run,
) -> None:
    """Stop a run; what it has finished stays."""
    from srccore.kubeflow.client import connect
    from srccore.kubeflow.runs import FINISHED, stop

    backend = connect(connection, needs_namespace=False)
    state = stop(backend, run)
    done = f"had finished before: {state}" if state in FINISHED else "is being stopped"
    typer.echo(f"Run {run} {done}.")


def _follow(
    backend: Backend, connection: Connection, run_id: str, interval: float, timeout: float | None
) -> None:
    """Follows a run, and exits with what became of it."""
    from rich.console import Console

    from srccore.kubeflow.follow import ending, follow, screen

    goes_on = (
        f"The run goes on. Follow it: {_follow_it(connection, run_id)}\n"
        f"Stop it: srccore runs stop {run_id}{connection.options()}"
    )
    try:
        with screen(Console(highlight=False)) as on:
            run = follow(backend, run_id, on, interval=interval, timeout=timeout)
    except KeyboardInterrupt:
        typer.echo(f"\n{goes_on}")
        raise typer.Exit(130) from None
    except TimeoutError:
        typer.echo(f"It has not finished after {timeout:g} s. {goes_on}")
        raise typer.Exit(TIMED_OUT) from None
    except UserError:
        typer.echo(goes_on)
        raise
    typer.echo(ending(run, backend.run_url(run_id)))
    if run.state != "SUCCEEDED":
        raise typer.Exit(1)


def _follow_it(connection: Connection, run_id: str) -> str:
    return f"srccore runs status {run_id} --wait{connection.options()}"


def _now() -> datetime:
    return datetime.now(UTC)
