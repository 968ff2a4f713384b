"""Runs of a compiled pipeline on a backend: submit, get, list and stop."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import yaml

from srccore.errors import UserError
from srccore.hashing import hash_text
from srccore.kubeflow.client import Backend, MissingError
from srccore.kubeflow.package import Package
from srccore.kubeflow.tasks import moment

__all__ = ["FINISHED", "get_run", "list_runs", "pipeline_source", "seconds", "stop", "submit"]

FINISHED = frozenset({"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"})


def submit(
    backend: Backend,
    package: Package,
    arguments: Mapping[str, Any],
    *,
    name: str | None = None,
    experiment: str | None = None,
    service_account: str | None = None,
    cache: bool = True,
    upload: bool = False,
) -> Any:
    """Starts a run.

    Args:
        backend: The backend.
        package: The pipeline.
        arguments: The run's parameters, as `Package.arguments` returns them.
        name: The run's display name; by default, the pipeline's name and the time.
        experiment: Its experiment, created if missing; by default, named after the pipeline.
        service_account: The pods' service account; by default, the backend's.
        cache: False turns Kubeflow's cache off; finished work under the artifact root is
            reused all the same.
        upload: Whether to upload the pipeline; see `pipeline_source`.

    Returns:
        A ``V2beta1Run``.
    """
    from kfp_server_api import V2beta1Run, V2beta1RuntimeConfig

    source = pipeline_source(backend, package, cache=cache, upload=upload)
    body = V2beta1Run(
        display_name=name or f"{package.name} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
        experiment_id=backend.create_experiment(experiment or package.name),
        runtime_config=V2beta1RuntimeConfig(parameters=dict(arguments)),
        service_account=service_account,
        **source,
    )
    return backend.call(backend.runs.run_service_create_run, run=body)


def pipeline_source(
    backend: Backend, package: Package, *, cache: bool, upload: bool
) -> dict[str, Any]:
    """The pipeline that a run or a recurring run starts.

    The name of an uploaded version has the version of srccore and the hash of its text. An
    existing version of that name is therefore the same pipeline, and is reused.

    Args:
        backend: The backend.
        package: The pipeline.
        cache: False turns the cache off in the pipeline that is sent or uploaded.
        upload: True stores it on the backend, as a version of the pipeline of its name, which is
            created if missing; False sends it with the run and stores nothing.

    Returns:
        The field of a ``V2beta1Run`` or ``V2beta1RecurringRun``, by name.
    """
    from kfp_server_api import V2beta1PipelineVersionReference

    spec = package.spec(cache=cache)
    if not upload:
        return {"pipeline_spec": spec}
    text = yaml.safe_dump_all(spec.values() if "platform_spec" in spec else [spec])
    pipeline_id = backend.create_pipeline(package.name)
    name = f"{package.version}-{hash_text(text)[:12]}"
    version_id = backend.create_version(pipeline_id, name, text)
    reference = V2beta1PipelineVersionReference(
        pipeline_id=pipeline_id, pipeline_version_id=version_id
    )
    return {"pipeline_version_reference": reference}


def get_run(backend: Backend, run_id: str) -> Any:
    """A ``V2beta1Run``, with its pipeline and what the backend knows about its tasks."""
    run = _run(backend, run_id)
    # The backend returns a run of an uploaded version without its pipeline.
    if run.pipeline_spec is None and run.pipeline_version_reference is not None:
        # A version can be deleted while its runs remain; their tasks can be listed without it.
        with contextlib.suppress(MissingError):
            run.pipeline_spec = backend.version_spec(run.pipeline_version_reference)
    return run


def list_runs(backend: Backend, experiment: str | None, limit: int) -> list[Any]:
    """Lists the most recent runs, newest first.

    Args:
        backend: The backend.
        experiment: List only the runs of this experiment; None lists those of all.
        limit: The maximum number of runs.

    Returns:
        A ``V2beta1Run`` each, without its tasks.

    Raises:
        UserError: The experiment does not exist.
    """
    where: dict[str, Any] = {"namespace": backend.namespace}
    if experiment is not None:
        where = {"experiment_id": backend.experiment(experiment)}
        if where["experiment_id"] is None:
            raise UserError(
                f"There is no experiment {experiment!r}.",
                "Without --experiment, srccore submit names the experiment after the pipeline.",
            )
    found = backend.pages(
        backend.runs.run_service_list_runs, "runs", sort_by="created_at desc", **where
    )
    return list(islice(found, limit))


def stop(backend: Backend, run_id: str) -> str:
    """Stops a run that has not finished.

    Args:
        backend: The backend.
        run_id: The run.

    Returns:
        The state it was in before.
    """
    state = str(_run(backend, run_id).state)
    if state not in FINISHED:
        backend.call(backend.runs.run_service_terminate_run, run_id=run_id)
    return state


def _run(backend: Backend, run_id: str) -> Any:
    return backend.call(backend.runs.run_service_get_run, run_id=run_id)


def seconds(run: Any) -> float | None:
    """How long a run took, or has taken so far; None if the backend does not know."""
    created, finished = moment(run.created_at), moment(run.finished_at)
    if run.state not in FINISHED:
        finished = datetime.now(UTC)
    return (finished - created).total_seconds() if finished and created else None
