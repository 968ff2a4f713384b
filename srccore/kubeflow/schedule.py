"""A schedule: a recurring run of a compiled pipeline, one run at a time, without catching up.

Display names of recurring runs need not be unique, so a new schedule replaces those of the same
name: it is created before the old ones are disabled, so that there is always one enabled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from srccore.errors import UserError
from srccore.kubeflow.client import Backend
from srccore.kubeflow.package import Package
from srccore.kubeflow.runs import pipeline_source

__all__ = ["Schedule", "next_times", "read_cron", "schedule"]

STANDARD, WITH_SECONDS = 5, 6
"""The number of fields in a crontab line, and in Kubeflow's format, which starts with seconds."""
EXAMPLE = 'Pass minute, hour, day, month and weekday, such as --cron "0 2 * * 0".'
_FIELD = re.compile(r"(?:[0-9*,/?-]|[A-Za-z]{3})+")
"""Numbers, symbols, and names of months and weekdays: what crontab and Kubeflow both support."""


@dataclass(frozen=True)
class Schedule:
    """A new schedule, and what it replaced.

    Args:
        id: The ID of the new recurring run.
        disabled: The IDs of the schedules of the same name that were disabled.
        version: The ``V2beta1PipelineVersionReference`` of its pipeline; None if not uploaded.
    """

    id: str
    disabled: tuple[str, ...]
    version: Any = None


def read_cron(line: str) -> str:
    """Checks a cron line and converts it to Kubeflow's format.

    Args:
        line: Five fields, as in a crontab, or six, starting with seconds.

    Returns:
        Six fields, starting with seconds.

    Raises:
        UserError: It is not a cron line, or uses something that Kubeflow does not support.
    """
    from croniter import croniter

    fields = line.split()
    if len(fields) == STANDARD:
        fields = ["0", *fields]
    cron = " ".join(fields)
    weekdays = re.split("[,-]", re.sub(r"/\d+", "", fields[-1])) if fields else []
    if len(fields) == WITH_SECONDS and "7" in weekdays:
        raise UserError(
            f"{line!r} is not valid: Kubeflow counts weekdays from 0 to 6.", "Use 0 for Sunday."
        )
    if (
        len(fields) != WITH_SECONDS
        or not all(_FIELD.fullmatch(each) for each in fields)
        or not croniter.is_valid(cron, second_at_beginning=True)
    ):
        raise UserError(f"{line!r} is not a valid cron line.", EXAMPLE)
    return cron


def next_times(cron: str, now: datetime, times: int = 3) -> list[datetime]:
    """The next times at which a schedule starts a run.

    Args:
        cron: Six fields, starting with seconds.
        now: The times are after this one, in its time zone.
        times: The number of times.
    """
    from croniter import croniter

    iterator = croniter(cron, now, ret_type=datetime, second_at_beginning=True)
    return [iterator.get_next() for _ in range(times)]


def schedule(
    backend: Backend,
    package: Package,
    arguments: Mapping[str, Any],
    *,
    name: str,
    cron: str,
    experiment: str | None = None,
    service_account: str | None = None,
    cache: bool = True,
    upload: bool = False,
) -> Schedule:
    """Creates a recurring run, and disables existing ones of the same name.

    Args:
        backend: The backend.
        package: The pipeline.
        arguments: The parameters of the runs, as `Package.arguments` returns them.
        name: The schedule's display name.
        cron: Six fields, as `read_cron` returns them.
        experiment: The experiment of the runs, created if missing; by default, named after the
            pipeline.
        service_account: The pods' service account; by default, the backend's.
        cache: False turns Kubeflow's cache off; finished work under the artifact root is
            reused all the same.
        upload: Whether to upload the pipeline; see `pipeline_source`.

    Raises:
        UserError: The backend rejects the new schedule, or an old one could not be disabled.
    """
    import kfp_server_api as api

    source = pipeline_source(backend, package, cache=cache, upload=upload)
    body = api.V2beta1RecurringRun(
        display_name=name,
        description=f"srccore {package.version}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        experiment_id=backend.create_experiment(experiment or package.name),
        namespace=backend.namespace,
        runtime_config=api.V2beta1RuntimeConfig(parameters=dict(arguments)),
        service_account=service_account,
        trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=cron)),
        mode=api.RecurringRunMode.ENABLE,
        no_catchup=True,
        max_concurrency="1",
        **source,
    )
    service = backend.recurring_runs
    made = backend.call(service.recurring_run_service_create_recurring_run, recurring_run=body)
    new = str(made.recurring_run_id)
    disabled = tuple(_disable_others(backend, name, new))
    return Schedule(new, disabled, body.pipeline_version_reference)


def _disable_others(backend: Backend, name: str, new: str) -> list[str]:
    service = backend.recurring_runs
    old = "an older schedule"
    done = []
    try:
        method = service.recurring_run_service_list_recurring_runs
        where = {"namespace": backend.namespace}
        found = backend.named(name, "display_name", method, "recurring_runs", **where)
        # Read all pages before the first change, since changes shift the pages that follow.
        enabled = [str(each.recurring_run_id) for each in found if _is_enabled(each)]
        others = [each for each in enabled if each != new]
        for old in others:
            backend.call(service.recurring_run_service_disable_recurring_run, recurring_run_id=old)
            done.append(old)
    except UserError as error:
        raise UserError(
            f"The new schedule {new} is enabled, but {old} of the same name could not be "
            f"disabled, so both may start runs: {error.what}",
            f"Disable one of them at {backend.ui}/#/recurringruns, or run this command again: it "
            "creates another schedule and disables the others.",
        ) from None
    return done


def _is_enabled(recurring_run: Any) -> bool:
    return bool(recurring_run.status == "ENABLED" or recurring_run.mode == "ENABLE")
