"""A schedule: a recurring run of a compiled pipeline, one at a time and without catching up.

Display names of recurring runs may repeat, so a schedule is replaced by one of its name: the new
one is made first and the old one disabled then, and there is no moment without one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from srccore.errors import UserError
from srccore.kubeflow.client import Backend, named
from srccore.kubeflow.package import Package
from srccore.kubeflow.runs import pipeline_source

__all__ = ["Schedule", "next_times", "read_cron", "schedule"]

STANDARD, WITH_SECONDS = 5, 6
"""Fields of a cron line as crontab has it, and as Kubeflow reads it: seconds first."""
EXAMPLE = 'Write minute, hour, day, month and weekday, such as --cron "0 2 * * 0".'
_FIELD = re.compile(r"(?:[0-9*,/?-]|[A-Za-z]{3})+")
"""Numbers, marks, names of months and weekdays: what crontab and Kubeflow both know."""


@dataclass(frozen=True)
class Schedule:
    """What was made and what it replaced.

    Args:
        id: The new recurring run.
        disabled: Those of its name that were enabled before.
        version: The ``V2beta1PipelineVersionReference`` of what it starts; None if not uploaded.
    """

    id: str
    disabled: tuple[str, ...]
    version: Any = None


def read_cron(line: str) -> str:
    """Checks a cron line and gives it the form that Kubeflow reads.

    Args:
        line: Five fields as in a crontab, or six with the seconds first.

    Returns:
        Six fields, seconds first.

    Raises:
        UserError: It is no cron line, or has what Kubeflow does not know.
    """
    from croniter import croniter

    fields = line.split()
    if len(fields) == STANDARD:
        fields = ["0", *fields]
    cron = " ".join(fields)
    weekdays = re.split("[,-]", re.sub(r"/\d+", "", fields[-1])) if fields else []
    if len(fields) == WITH_SECONDS and "7" in weekdays:
        raise UserError(f"{line!r}: Kubeflow counts weekdays from 0 to 6.", "Write 0 for Sunday.")
    if (
        len(fields) != WITH_SECONDS
        or not all(_FIELD.fullmatch(each) for each in fields)
        or not croniter.is_valid(cron, second_at_beginning=True)
    ):
        raise UserError(f"{line!r} is no cron line.", EXAMPLE)
    return cron


def next_times(cron: str, now: datetime, times: int = 3) -> list[datetime]:
    """When a schedule starts runs.

    Args:
        cron: Six fields, seconds first.
        now: The times are after this one, and in its zone.
        times: How many.
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
    """Makes a recurring run, and disables those of its name that there were.

    Args:
        backend: Where.
        package: The pipeline.
        arguments: The runs' parameters, as `Package.arguments` gives them.
        name: The schedule's display name.
        cron: Six fields, seconds first, as `read_cron` gives them.
        experiment: The runs' experiment, made where missing; the pipeline's name where None.
        service_account: The pods' account; the backend's default where None.
        cache: False turns Kubeflow's cache off; finished work under the artifact root is still
            found.
        upload: Whether the pipeline is uploaded, as `pipeline_source` says.

    Raises:
        UserError: The backend refuses the new one, or to disable an old one.
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
    old = "an older one"
    done = []
    try:
        found = backend.pages(
            service.recurring_run_service_list_recurring_runs,
            "recurring_runs",
            namespace=backend.namespace,
            filter=named(name),
        )
        # All pages before the first change: a page is counted from those before it.
        others = [
            str(each.recurring_run_id)
            for each in found
            if each.display_name == name and each.recurring_run_id != new and _is_enabled(each)
        ]
        for old in others:
            backend.call(service.recurring_run_service_disable_recurring_run, recurring_run_id=old)
            done.append(old)
    except UserError as error:
        raise UserError(
            f"The new schedule {new} is enabled, but {old} of the same name could not be looked "
            f"up and disabled, so both may start runs: {error.what}",
            f"Disable one of them at {backend.ui}/#/recurringruns, or run this command again: it "
            "makes one more and disables all others.",
        ) from None
    return done


def _is_enabled(recurring_run: Any) -> bool:
    return bool(recurring_run.status == "ENABLED" or recurring_run.mode == "ENABLE")
