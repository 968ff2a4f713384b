"""The commands that talk to Kubeflow Pipelines: ``srccore submit``, ``schedule``, ``runs``.

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
from srccore.shown import visible

if TYPE_CHECKING:
    from srccore.kubeflow.client import Backend

__all__ = ["runs_app", "schedule_command", "submit_command"]

runs_app = typer.Typer(
    help="List, follow and stop runs on Kubeflow Pipelines.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

TIMED_OUT = 124
"""The exit code when --timeout expires, as with ``timeout`` of coreutils."""

File = Annotated[
    Path, typer.Argument(help="A file written by srccore compile.", show_default=False)
]
ArtifactRoot = Annotated[
    str,
    typer.Option(metavar="URI", help="Where the run writes its outputs: s3://BUCKET/PREFIX."),
]
Experiment = Annotated[
    str | None, typer.Option(help="The experiment; named after the pipeline by default.")
]
ServiceAccount = Annotated[
    str | None,
    typer.Option(help="The service account of the pods; the backend's default if not set."),
]
Cache = Annotated[
    bool,
    typer.Option(
        "--cache/--no-cache",
        help="Whether Kubeflow may reuse tasks of earlier runs without starting a pod. Finished "
        "work under the artifact root is reused either way.",
    ),
]
Upload = Annotated[
    bool,
    typer.Option(
        "--upload",
        help="Also store the pipeline on Kubeflow, as a version of the pipeline of its name, so "
        "that everyone can find and start it in the UI.",
    ),
]
Wait = Annotated[
    bool,
    typer.Option(
        "--wait",
        help="Follow the run; exit with 0 if it succeeds, 1 if it doesn't, 124 on --timeout.",
    ),
]
Interval = Annotated[
    float, typer.Option(min=0.01, metavar="SECONDS", help="The time between two status requests.")
]
Timeout = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="How long to follow the run. It keeps running."),
]
Run = Annotated[str, typer.Argument(help="The ID of the run.", show_default=False)]


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
        str,
        typer.Option(help="The schedule's name; it replaces enabled schedules of the same name."),
    ],
    cron: Annotated[
        str,
        typer.Option(
            metavar="LINE",
            help='Five fields, as in a crontab, or six, starting with seconds: "0 2 * * 0".',
        ),
    ],
    overrides: Overrides,
    parameters: Parameters,
    experiment: Experiment = None,
    service_account: ServiceAccount = None,
    cache: Cache = True,
    upload: Upload = False,
) -> None:
    """Start runs of a compiled pipeline on a schedule.

    Runs start one at a time, and missed times are skipped.
    """
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
        typer.echo(f"Disabled the earlier schedule of that name: {old}")
    times = ", ".join(
        f"{each:%a %Y-%m-%d %H:%M:%S}" for each in next_times(line, datetime.now(UTC))
    )
    typer.echo(f"Next runs, if the backend's clock is set to UTC: {times}")


@runs_app.command("list")
@with_connection
def list_command(
    connection: Connection,
    experiment: Annotated[
        str | None, typer.Option(help="Only list the runs of this experiment.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The maximum number of runs.")] = 20,
) -> None:
    """List the most recent runs, newest first."""
    from srccore.kubeflow.client import connect
    from srccore.kubeflow.follow import duration
    from srccore.kubeflow.runs import list_runs, seconds
    from srccore.kubeflow.tasks import moment

    backend = connect(connection)
    rows = [("ID", "NAME", "STATE", "CREATED (UTC)", "DURATION")]
    for run in list_runs(backend, experiment, limit):
        submitted, took = moment(run.created_at), seconds(run)
        created = f"{submitted:%Y-%m-%d %H:%M}" if submitted else "-"
        lasted = duration(took) if took is not None else "-"
        name = visible(run.display_name)
        rows.append((run.run_id, name, run.state or "PENDING", created, lasted))
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
    """Show the progress of a run, or follow it."""
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
    """Stop a run. Its finished work is kept."""
    from srccore.kubeflow.client import connect
    from srccore.kubeflow.runs import FINISHED, stop

    backend = connect(connection, needs_namespace=False)
    state = stop(backend, run)
    done = f"has already finished: {state}" if state in FINISHED else "is being stopped"
    typer.echo(f"Run {run} {done}.")


def _follow(
    backend: Backend, connection: Connection, run_id: str, interval: float, timeout: float | None
) -> None:
    """Follows a run, and exits with a code that tells how it ended."""
    from rich.console import Console

    from srccore.kubeflow.follow import ending, follow, screen

    still_running = (
        f"The run continues. Follow it: {_follow_it(connection, run_id)}\n"
        f"Stop it: srccore runs stop {run_id}{connection.options()}"
    )
    try:
        with screen(Console(highlight=False)) as on:
            run = follow(backend, run_id, on, interval=interval, timeout=timeout)
    except KeyboardInterrupt:
        typer.echo(f"\n{still_running}")
        raise typer.Exit(130) from None
    except TimeoutError:
        typer.echo(f"It has not finished after {timeout:g} s. {still_running}")
        raise typer.Exit(TIMED_OUT) from None
    except UserError:
        typer.echo(still_running)
        raise
    typer.echo(ending(run, backend.run_url(run_id)))
    if run.state != "SUCCEEDED":
        raise typer.Exit(1)


def _follow_it(connection: Connection, run_id: str) -> str:
    return f"srccore runs status {run_id} --wait{connection.options()}"
