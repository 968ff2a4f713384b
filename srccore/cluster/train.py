"""Runs a training stage in the pod of its step, or as a job that the step watches."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from srccore import storage
from srccore.cluster.request import (
    ARGO,
    INPROCESS,
    LAUNCHERS,
    JobSettings,
    Launcher,
    Owner,
    TrainingJobRequest,
)
from srccore.config import RunConfig, explain
from srccore.errors import UserError
from srccore.stages.table import STAGES
from srccore.steps.step import Finished, explained, finished_stage, run_stage

if TYPE_CHECKING:
    from srccore.cluster.api import Api
    from srccore.cluster.task import StageTask

__all__ = ["SPEC_FILE", "train"]

SPEC_FILE = "job.yaml"
"""In the folder of a stage that was trained by a job: the job as it was requested."""

WORKFLOW_LABEL = "workflows.argoproj.io/workflow"
RUN_LABEL = "pipeline/runid"
ASKING_SECONDS = 120.0
"""How long the API server may be unavailable before there is a job."""


def train(
    stage: str,
    artifact_root: str,
    *,
    launcher: str,
    inputs: Mapping[str, str | Sequence[str] | None],
    settings: Mapping[str, Any],
    device: str = "auto",
    threads: int = 0,
    round_number: int = 1,
    job: Mapping[str, Any] | None = None,
    node_selector: Mapping[str, str] | None = None,
    tolerations: Sequence[Mapping[str, Any]] | None = None,
    memory: str = "",
    gpus: str = "",
) -> Finished:
    """Runs a training stage with a launcher; see also `srccore.steps.step.run_stage`.

    Args:
        stage: The name of a stage that trains.
        artifact_root: The folder or ``s3://...`` to write below. A job requires the latter.
        launcher: ``inprocess`` trains here; one of `srccore.cluster.request.LAUNCHERS` creates a
            job, watches it and shows its log. A second attempt resumes watching the first one's
            job.
        inputs: Paths of Kubeflow's artifacts.
        settings: The stage function's other arguments.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of torch; 0 keeps torch's default.
        round_number: Part of the job's name.
        job: Fields of `srccore.cluster.request.JobSettings`; not used by ``inprocess``.
        node_selector: Overrides that of the job.
        tolerations: Override those of the job.
        memory: Overrides that of the job.
        gpus: Overrides that of the job.

    Returns:
        The URI of the output folder, and the metrics.

    Raises:
        SystemExit: With 2 for an error that the user can fix, with 1 if the job failed, with 143
            if this process was stopped.
    """
    if launcher == INPROCESS:
        return run_stage(
            stage, artifact_root, inputs=inputs, settings=settings, device=device, threads=threads
        )
    from srccore.cluster.launch import JobFailed, Stopped
    from srccore.cluster.task import StageTask, check_checkpoints, read_artifacts

    given = {
        "node_selector": node_selector,
        "tolerations": tolerations,
        "memory": memory,
        "gpus": gpus,
    }
    overrides = {name: value for name, value in given.items() if value}
    with explained():
        chosen = _chosen(launcher, artifact_root)
        wanted = _settings(stage, chosen, {**(job or {}), **overrides})
        _check_share(stage, settings, wanted)
        check_checkpoints(stage, settings)
        task = StageTask(
            stage=stage,
            artifact_root=artifact_root,
            inputs=read_artifacts(stage, inputs),
            settings=dict(settings),
            device=device,
            threads=threads,
        )
        try:
            return _train_as_job(chosen, task, wanted, round_number)
        except JobFailed as error:
            print(f"Error: {error}", file=sys.stderr)
            raise SystemExit(2 if error.exit_code == 2 else 1) from None
        except Stopped:
            raise SystemExit(143) from None


def _chosen(launcher: str, artifact_root: str) -> Launcher:
    if launcher not in LAUNCHERS:
        names = ", ".join((INPROCESS, *LAUNCHERS))
        raise UserError(f"Unknown launcher {launcher!r}.", f"Choose one of {names}.")
    if not storage.is_remote(artifact_root):
        raise UserError(
            f"The pods of a job cannot write to {artifact_root}: they share no disk with this pod.",
            "Pass an artifact root in a bucket: s3://BUCKET/PATH.",
        )
    return LAUNCHERS[launcher]


def _settings(stage: str, launcher: Launcher, values: Mapping[str, Any]) -> JobSettings:
    try:
        settings = JobSettings.model_validate(values)
    except ValidationError as error:
        raise explain(f"job of {stage}", error, "Fix {name} in the parameter job.") from None
    launcher.check(f"The parameter job of {stage}", dict(settings))
    return settings


def _check_share(stage: str, settings: Mapping[str, Any], job: JobSettings) -> None:
    """Refuses a batch now that the processes would refuse once they are scheduled and started."""
    from srccore.training.ranks import local_share

    section: Any = RunConfig.model_fields[STAGES[stage].sections["config"]].annotation
    try:
        optimizer = section.model_validate(settings.get("config"))
    except ValidationError:
        return  # The stage explains invalid settings better.
    local_share(optimizer, job.pods * job.processes)


def _train_as_job(
    launcher: Launcher, task: StageTask, settings: JobSettings, round_number: int
) -> Finished:
    from srccore.cluster.api import connect
    from srccore.cluster.launch import Launch, signals
    from srccore.cluster.observe import Limits

    uri = task.uri()
    if done := finished_stage(task.stage, uri):
        return done
    api = connect()
    run, owner = _belongs_to(api, uri)
    try:
        request = TrainingJobRequest(
            stage=task.stage,
            run=run,
            round_number=round_number,
            namespace=api.namespace,
            task=task.model_dump_json(),
            settings=settings,
            owner=owner,
        )
    except ValidationError as error:
        raise explain(
            f"job of {task.stage}", error, "Fix the profile or the artifact root."
        ) from None
    _save_spec(request.to_object(launcher, 1), uri)
    found: list[Finished] = []

    def published() -> bool:
        found.extend(filter(None, [finished_stage(task.stage, uri)]))
        return bool(found)

    launch = Launch(api, launcher, request, Limits.of(settings), published)
    with signals(launch.stop):
        launch.run()
    return found[-1]


def _belongs_to(api: Api, uri: str) -> tuple[str, Owner | None]:
    """A short name for the run, and the Workflow that this pod is a step of.

    Outside a workflow the run is named after what is trained, so that repeating a command resumes
    the same job.
    """
    from srccore.cluster.api import ApiError, retried

    def ask(path: str) -> dict[str, Any]:
        return retried(lambda: api.get(path), ASKING_SECONDS)

    alone = (uri.rpartition("/")[2][:8], None)
    pod = os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "")
    if not os.environ.get("KUBERNETES_SERVICE_HOST") or not pod:
        return alone
    pods = f"/api/v1/namespaces/{api.namespace}/pods"
    try:
        labels = ask(f"{pods}/{pod}")["metadata"].get("labels", {})
        name = labels.get(WORKFLOW_LABEL)
        if not name:
            return alone
        workflow = ask(f"/apis/{ARGO}/namespaces/{api.namespace}/workflows/{name}")
    except ApiError as error:
        raise UserError(
            f"This pod cannot determine which workflow it belongs to ({error}).",
            "Bind the Role srccore-launcher of manifests/base to the service account of the step.",
        ) from None
    owner = Owner(name=name, uid=workflow["metadata"]["uid"])
    run = labels.get(RUN_LABEL) or owner.uid
    return run.replace("-", "")[:8].lower(), owner


def _save_spec(spec: Mapping[str, Any], uri: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        text = yaml.safe_dump(dict(spec), sort_keys=False)
        (Path(scratch) / SPEC_FILE).write_text(text, encoding="utf-8")
        storage.publish(Path(scratch), uri)
