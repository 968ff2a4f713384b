"""Creates a training job, or adopts that of an earlier attempt, and watches it until it ends.

Invariants, whose reasons are in docs/training-job.md:

* One name, one specification: a job is adopted only if its hash and its spec are the same.
* A pod belongs to the job that owns it, whatever its labels say.
* A job that is given up is deleted; a job that continues without the step can be adopted.
* Success means that the output is in the store, not that the operator reports it.
* An outage of the API server costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from srccore.cluster.api import Api, ApiError, retried
from srccore.cluster.observe import (
    QUOTA,
    Assessment,
    Limits,
    Observer,
    Outcome,
    condition,
    happened,
    pod_index,
    states,
)
from srccore.cluster.ownership import difference, is_pod_of
from srccore.cluster.request import ARGO, SPEC_HASH, Launcher, TrainingJobRequest
from srccore.cluster.watching import LogStream, Mirror
from srccore.errors import UserError
from srccore.shown import shown, visible

__all__ = ["JobFailed", "Launch", "Stopped", "signals"]

Object = dict[str, Any]

OUTAGE_SECONDS = 900.0
"""How long the API server may be unavailable."""
DELETE_SECONDS = 20.0
ASK_SECONDS = 5.0
"""How long to try, after SIGTERM, to find out whether the workflow continues."""
QUOTA_SECONDS = 15.0
TICK_SECONDS = 5.0
"""How often to check the clocks if nothing else happens; costs no request."""
WARNINGS_SECONDS = 10.0
"""The first interval between two requests for the reasons of missing pods; it doubles each time."""
SELDOM_SECONDS = 300.0
LAST_LINES = 30
LAST_EVENTS = 5
REST_OF_LOG_SECONDS = 20.0
AWAY = "The API server is not responding as expected ({}); retrying."
NO_RIGHT = re.compile(r'User ".*" cannot ')
"""How the API server reports a verb and a resource that a role lacks."""


class JobFailed(Exception):  # noqa: N818  # an outcome, not a defect
    """The job failed or was given up; the same step may succeed another time.

    Args:
        what: What happened.
        fix: What to do about it.
        exit_code: The exit code of the pod that failed first, if any.
    """

    def __init__(self, what: str, fix: str, exit_code: int | None = None) -> None:
        super().__init__(shown(f"{what} {fix}"))
        self.exit_code = exit_code


class Stopped(Exception):  # noqa: N818  # not an error: somebody asked for it
    """This process was asked to stop."""


@contextlib.contextmanager
def signals(stop: Callable[[], None]) -> Iterator[None]:
    """Calls a function on SIGTERM and SIGINT while the context is open."""

    def handle(_number: int, _frame: object) -> None:
        stop()

    before = {each: signal.signal(each, handle) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    print(visible(line.rstrip("\r")), file=sys.stderr, flush=True)


@dataclass
class Launch:
    """One attempt of a step to run its job.

    Args:
        api: The API server.
        launcher: Which operator runs the job.
        request: The job.
        limits: The limits of the job.
        published: Whether the output of the job is in the store.
        say: Called with every line for the log, including those of the job's own log.
        outage: How long the API server may be unavailable, in seconds.
    """

    api: Api
    launcher: Launcher
    request: TrainingJobRequest
    limits: Limits
    published: Callable[[], bool]
    say: Callable[[str], None] = _say
    outage: float = OUTAGE_SECONDS
    # Unlike an event, a signal handler may write to it whatever the main thread is doing.
    _wakes: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)
    _stopping: bool = False
    _said: str = ""
    _asked_for: Object | None = None
    _waited: float = 0.0
    _away_since: float | None = None
    _warned_at: float = 0.0
    _warned_every: float = 0.0
    _last_warnings: list[Object] = field(default_factory=list)

    def stop(self) -> None:
        """Makes `run` stop soon; may be called from a signal handler or another thread."""
        self._stopping = True
        self._wake()

    def run(self) -> None:
        """Runs the job until it succeeds.

        Raises:
            UserError: The API server refused something that the user has to fix.
            JobFailed: The job failed, was given up or was deleted.
            Stopped: `stop` was called.
        """
        job = None
        try:
            job = self._create()
            self._watch(job)
        except Stopped:
            job = job or self._created_unseen()
            if job and self._continues():
                self.say(f"{_path(job)} continues; the next attempt of this step will watch it.")
            elif job:
                self._delete(job)
            raise

    # -- creating ------------------------------------------------------------------------------

    def _create(self) -> Object:
        """Creates or adopts the job."""
        began = time.monotonic()
        attempt = 1
        while True:
            body = self.request.to_object(self.launcher, attempt)
            try:
                self._asked_for = body
                ask = functools.partial(self.api.create, self._jobs, body)
                job = retried(ask, self.outage, self._away)
            except ApiError as error:
                waited = self._waited = time.monotonic() - began
                in_time = waited < self.limits.waiting
                if error.status == 409:
                    # The name is taken, or many requests compete for one quota.
                    found = self._existing(body)
                    if found is None and not in_time:
                        raise self._refusal(error) from None
                    if found is None:
                        self._pause(1.0)
                    elif condition(found, "Failed"):
                        attempt += 1
                    else:
                        self.say(f"{_path(found)} already exists; this step adopts it.")
                        return found
                elif QUOTA.search(error.message) and in_time:
                    self._tell(f"Waiting for the namespace's quota: {error.message}")
                    self._pause(QUOTA_SECONDS)
                elif NO_RIGHT.search(error.message) and waited < self.limits.refused:
                    # A server that has just started does not know all roles yet.
                    self._away(error, 1.0)
                else:
                    raise self._refusal(error) from None
            else:
                self.say(f"Created {_path(job)} ({self.launcher.api_version}).")
                return job

    def _existing(self, body: Object) -> Object | None:
        """The job of that name if it is ours; None if it is deleted or being deleted."""
        name = body["metadata"]["name"]
        path = f"{self._jobs}/{name}"
        try:
            found = retried(lambda: self.api.get(path), self.outage, self._away)
        except ApiError as error:
            if error.status == 404:
                return None
            raise self._refusal(error) from None
        if "deletionTimestamp" in found["metadata"]:
            self._tell(f"{_path(found)} is being deleted; waiting until it is gone.")
            return None
        if not _is_same(found, body):
            differs = difference(body["spec"], found.get("spec") or {})
            raise UserError(
                f"{_path(found)} already exists with a different spec"
                f"{f' ({differs})' if differs else ''}.",
                "If two tasks of one run train the same stage in the same round, set different "
                "values of round_number. Otherwise delete the job, if nobody needs it.",
            )
        return found

    def _created_unseen(self) -> Object | None:
        """The job that may have been created although its response was lost."""
        body = self._asked_for
        try:
            found = self.api.get(f"{self._jobs}/{body['metadata']['name']}") if body else None
        except ApiError as error:
            if body and error.status != 404:
                self.say(f"{_path(body)} may have been created, but the API server is unavailable.")
                return None
            found = None
        if found is None or body is None or not _is_same(found, body):
            self.say("Stopped before the job was created.")
            return None
        return found

    # -- watching ------------------------------------------------------------------------------

    def _watch(self, job: Object) -> None:
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        jobs = Mirror(self.api, self._jobs, self._wake, fieldSelector=f"metadata.name={name}")
        pods = Mirror(
            self.api, self._pods, self._wake, labelSelector=f"{self.launcher.job_label}={name}"
        )
        observer = Observer(self.launcher, self.request.settings.pods, self.limits, self._waited)
        log = _Log(self)
        jobs.start()
        pods.start()
        try:
            while True:
                self._pause(TICK_SECONDS)
                if not self._is_up_to_date(jobs, pods, job):
                    continue
                found = next(
                    (each for each in jobs.objects if each["metadata"]["uid"] == uid), None
                )
                if found is None:
                    self._deleted(job)
                    return
                log.follow(self._own(found, pods.objects))
                found, seen = self._judge(observer, found, pods)
                if seen.outcome:
                    if seen.outcome.succeeded or seen.outcome.exit_code is not None:
                        log.finish()
                    self._conclude(found, seen.outcome, log)
                    return
                self._tell(seen.message)
        finally:
            log.stop()
            jobs.stop()
            pods.stop()

    def _judge(self, observer: Observer, job: Object, pods: Mirror) -> tuple[Object, Assessment]:
        known, gone = self._own(job, pods.objects), self._own(job, pods.take_gone())
        warnings = self._late_warnings(job, known, observer.pods)
        seen = observer.look(job, known, warnings, datetime.now(UTC), gone)
        if seen.outcome and not seen.outcome.succeeded:
            # Watches lag behind, each by its own time: confirm the state before giving up.
            try:
                job = self.api.get(f"{self._jobs}/{job['metadata']['name']}")
                known = self._own(job, self.api.get(self._pods, **pods.selectors)["items"])
            except ApiError:
                return job, Assessment(seen.message)
            seen = observer.look(job, known, warnings, datetime.now(UTC), gone)
        return job, seen

    def _own(self, job: Object, labelled: list[Object]) -> list[Object]:
        return [pod for pod in labelled if is_pod_of(self.launcher, job, pod)]

    def _is_up_to_date(self, jobs: Mirror, pods: Mirror, job: Object) -> bool:
        """Whether the mirrors are current; gives up if they have not been for too long."""
        error = jobs.error or pods.error
        if error is None:
            self._away_since = None
            return jobs.is_known and pods.is_known
        since = self._away_since = self._away_since or time.monotonic()
        self._tell(AWAY.format(error))
        # Permissions that existed a moment ago may come back, like the server itself.
        comes_back = error.is_temporary or (jobs.is_known and pods.is_known)
        if time.monotonic() - since > (self.outage if comes_back else self.limits.refused):
            if comes_back:
                raise JobFailed(
                    f"The API server has been unavailable for {self.outage:.0f} s ({error}).",
                    f"{_path(job)} may continue; the next attempt of this step will watch it.",
                )
            self._delete(job)
            raise self._refusal(error)
        return False

    def _conclude(self, job: Object, outcome: Outcome, log: _Log) -> None:
        if outcome.succeeded:
            if not self.published():
                self._delete(job)
                raise JobFailed(
                    f"{_path(job)} is reported as succeeded, but has published nothing.",
                    "Check its log above: its pods may have been stopped from outside.",
                )
            self.say(f"{_path(job)} has succeeded.")
            return
        if self._is_published_after_all():
            if not condition(job, "Failed"):
                self._delete(job)
            self.say(
                f"{_path(job)} has published its result, so this is not an error: {outcome.what}"
            )
            return
        if outcome.pod and outcome.pod != log.pod:
            self._tail(outcome.pod)
        for warning in self._warnings(job, *self._makers(job), outcome.pod)[-LAST_EVENTS:]:
            self.say(f"Event: {warning['involvedObject']['name']}: {warning['message']}")
        if not condition(job, "Failed"):
            self._delete(job)
        raise JobFailed(f"{_path(job)}: {outcome.what}", outcome.fix, outcome.exit_code)

    def _is_published_after_all(self) -> bool:
        try:
            return self.published()
        except UserError:
            return False  # The failure of the job says more than that of the store.

    def _deleted(self, job: Object) -> None:
        """Handles a job that is gone: its TTL is over, or somebody deleted it."""
        if not self.published():
            raise JobFailed(
                f"{_path(job)} was deleted before it published anything.",
                "Somebody deleted the job or its owner. Run the step again.",
            )
        self.say(f"{_path(job)} is gone, but its output has been published.")

    # -- ending --------------------------------------------------------------------------------

    def _continues(self) -> bool:
        """Whether the workflow continues, so that there may be another attempt."""
        owner = self.request.owner
        if owner is None:
            return False
        path = f"/apis/{ARGO}/namespaces/{self.request.namespace}/workflows/{owner.name}"
        try:
            workflow = retried(lambda: self.api.get(path), ASK_SECONDS)
        except ApiError as error:
            # If unknown, assume that it continues: do not lose the training because of a guess.
            return error.status != 404
        spec, status = workflow.get("spec", {}), workflow.get("status", {})
        return not (
            "deletionTimestamp" in workflow["metadata"]
            or workflow["metadata"]["uid"] != owner.uid
            or spec.get("shutdown")
            # This is how Kubeflow Pipelines terminates a run.
            or spec.get("activeDeadlineSeconds") == 0
            or status.get("phase") in ("Succeeded", "Failed", "Error")
        )

    def _delete(self, job: Object) -> None:
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        try:
            retried(lambda: self.api.delete(f"{self._jobs}/{name}", uid), DELETE_SECONDS)
        except ApiError as error:
            # It is gone already, or another job has its name.
            if error.status not in (404, 409):
                self.say(f"Could not delete {_path(job)} ({error}). Delete it with kubectl.")
                return
        self.say(f"Deleted {_path(job)}.")

    # -- logging -------------------------------------------------------------------------------

    def _tell(self, message: str) -> None:
        """Logs a message unless it is the same as before."""
        if message != self._said:
            self._said = message
            self.say(message)

    def _away(self, error: ApiError, seconds: float) -> None:
        self._tell(AWAY.format(error))
        self._pause(seconds)

    def _wake(self) -> None:
        self._wakes.put(None)

    def _pause(self, seconds: float) -> None:
        """Waits until something happens, at most for that long."""
        self._check_stop()
        with contextlib.suppress(queue.Empty):
            self._wakes.get(timeout=seconds)
            while True:
                self._wakes.get_nowait()
        self._check_stop()

    def _check_stop(self) -> None:
        if self._stopping:
            raise Stopped

    def _late_warnings(self, job: Object, pods: list[Object], wanted: int) -> list[Object]:
        """Warnings about what keeps pods from running, requested less and less often.

        The API server reads all events of the namespace for this, and a queue may last for hours.
        """
        missing = self._makers(job) if len(pods) < wanted else ()
        set_up = [each["metadata"]["name"] for each in pods if _is_starting(each)]
        names = (*missing, *sorted(set_up)[:1])
        if condition(job, "Suspended") or not names:
            self._last_warnings, self._warned_every = [], 0.0
        elif time.monotonic() - self._warned_at >= self._warned_every:
            self._warned_at = time.monotonic()
            longer = max(WARNINGS_SECONDS, 2 * self._warned_every)
            self._warned_every = min(longer, SELDOM_SECONDS)
            self._last_warnings = self._warnings(job, *names)
        return self._last_warnings

    def _makers(self, job: Object) -> tuple[str, str]:
        """The job, and the object that creates its pods: for some launchers, a different one."""
        name = job["metadata"]["name"]
        return name, f"{name}{self.launcher.maker}"

    def _warnings(self, job: Object, *names: str | None) -> list[Object]:
        """Warnings about objects of those names since the job was created, the oldest first."""
        found = []
        for name in filter(None, set(names)):
            selector = f"type=Warning,involvedObject.name={name}"
            with contextlib.suppress(ApiError):
                found += self.api.get(self._events, fieldSelector=selector)["items"]
        # An earlier job may have had the same name.
        since = job["metadata"]["creationTimestamp"][:19]
        return sorted((each for each in found if happened(each) >= since), key=happened)

    def _tail(self, pod: str) -> None:
        try:
            text = self.api.text(
                f"{self._pods}/{pod}/log",
                container=self.launcher.container,
                tailLines=str(LAST_LINES),
            )
        except ApiError as error:
            text = f"(no log: {error})"
        self.say(f"Last lines of {pod}:")
        for line in text.splitlines():
            self.say(f"  {line}")

    def _refusal(self, error: ApiError) -> UserError | JobFailed:
        """Explains a refusal of the API server."""
        namespace = self.request.namespace
        message = " ".join(error.message.split()).removesuffix(".")
        if error.is_temporary:
            return JobFailed(f"The API server did not respond: {message}.", "Try again later.")
        launcher = self.launcher
        known = (
            (
                "being terminated" in message,
                f"The namespace {namespace} is being deleted.",
                "Wait until it is gone, or use another namespace.",
            ),
            (
                QUOTA.search(message) is not None,
                f"The job did not fit into the namespace's quota in time: {message}.",
                "Delete finished jobs, or ask for a larger quota.",
            ),
            (
                error.status == 401,
                f"The API server rejected the credentials of this step: {message}.",
                "Check that its service account exists and that its token is valid.",
            ),
            (
                error.status == 403 and NO_RIGHT.search(message),
                f"The service account of this step lacks a permission: {message}.",
                "Bind the Role srccore-launcher of manifests/base to it.",
            ),
            (
                error.status == 404 and "namespaces" not in message,
                f"The cluster has no {launcher.kind} API ({launcher.api_version}).",
                f"Install {launcher.operator}, or compile the pipeline with another launcher.",
            ),
            (
                error.status == 409,
                f"The job could not be created in time: {message}.",
                "Check with kubectl describe what blocks the deletion of the job of that name.",
            ),
            (
                True,
                f"The API server rejected the {launcher.kind}: {message}.",
                "Fix the profile accordingly, and compile the pipeline again.",
            ),
        )
        return next(UserError(what, fix) for holds, what, fix in known if holds)

    @property
    def _jobs(self) -> str:
        namespace = self.request.namespace
        return f"/apis/{self.launcher.api_version}/namespaces/{namespace}/{self.launcher.plural}"

    @property
    def _pods(self) -> str:
        return f"/api/v1/namespaces/{self.request.namespace}/pods"

    @property
    def _events(self) -> str:
        return f"/api/v1/namespaces/{self.request.namespace}/events"


class _Log:
    """The log of the job's first pod, also after that pod is recreated."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._stream: LogStream | None = None
        self._uid = ""
        self.pod: str | None = None

    def follow(self, pods: list[Object]) -> None:
        """Starts following the first pod once its container has started."""
        launch, launcher = self._launch, self._launch.launcher
        first = [each for each in pods if pod_index(launcher, each) == 0 and _has_started(each)]
        # The recreated pod may exist beside the former one.
        pod = max(first, key=lambda each: each["metadata"]["creationTimestamp"], default=None)
        if pod is None or pod["metadata"]["uid"] == self._uid:
            return
        self.finish()
        self._uid, self.pod = pod["metadata"]["uid"], pod["metadata"]["name"]
        path = f"{launch._pods}/{self.pod}"
        self._stream = LogStream(launch.api, path, self._uid, launcher.container, launch.say)
        self._stream.start()

    def finish(self) -> None:
        """Waits for the last lines."""
        if self._stream:
            self._stream.finish(REST_OF_LOG_SECONDS, lambda: self._launch._stopping)

    def stop(self) -> None:
        """Stops following."""
        if self._stream:
            self._stream.stop()


def _is_same(found: Object, asked: Object) -> bool:
    """Whether a job is the one that was asked for: its annotation says so, and its spec is."""
    claimed, wanted = (
        each["metadata"].get("annotations", {}).get(SPEC_HASH) for each in (found, asked)
    )
    return claimed == wanted and difference(asked["spec"], found.get("spec") or {}) is None


def _has_started(pod: Object) -> bool:
    return any({"running", "terminated"} & state.keys() for state in states(pod))


def _is_starting(pod: Object) -> bool:
    return any("waiting" in state for state in states(pod))


def _path(job: Object) -> str:
    return f"{job['kind']} {job['metadata']['namespace']}/{job['metadata']['name']}"
