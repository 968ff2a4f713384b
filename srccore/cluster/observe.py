"""Judges the state of a training job. Makes no requests: objects in, an assessment out.

There are two clocks, since ``activeDeadlineSeconds`` would count the queue too: one runs while
pods are missing, the other starts when all of them run. Pods that can never start are recognised
by the reason why they wait. Lost pods are counted here, since the operator's own limit does not
apply to pods that it recreates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from srccore.cluster.request import JobSettings, Launcher

__all__ = [
    "QUOTA",
    "Assessment",
    "Limits",
    "Observer",
    "Outcome",
    "condition",
    "happened",
    "pod_index",
    "states",
]

Object = dict[str, Any]

PULLING = (
    "Check the image's name and tag, and that the node is allowed to pull it: a private registry "
    "needs a Secret that image_pull_secrets of the profile names."
)
MOUNTING = "Create the ConfigMap, Secret or claim that the profile names, or fix its name there."
NEVER_STARTS = {
    "FailedMount": MOUNTING,
    "ErrImagePull": PULLING,
    "ImagePullBackOff": PULLING,
    "InvalidImageName": "Fix the image's name: compile the pipeline with another --registry.",
    "ErrImageNeverPull": "Load the image on the node, or allow the node to pull it.",
    "CreateContainerConfigError": "Create the Secret or ConfigMap that the profile names, with all "
    "of its keys; or, if the message says that the image runs as root, rebuild the image.",
    "CreateContainerError": "Check the pod's events and the container runtime of the node.",
    "RunContainerError": "Check the pod's events and the container runtime of the node.",
}
"""Reasons for which a container waits forever, and what to do."""
NEVER_PULLED = (
    *("not found", "manifest unknown", "name unknown"),
    *("denied", "unauthorized", "forbidden", "no basic auth"),
)
"""Responses of a registry; a registry that does not respond may be back in a minute."""
NEVER_MADE = ("is forbidden: ", "is invalid: ", "denied the request", "denied request")
"""How a pod is refused for good, unless it is by a quota."""
QUOTA = re.compile("exceeded quota|status unknown for quota")
"""It is exceeded, or not calculated yet, which takes minutes for a new kind of object."""

EXIT_ADVICE = {
    1: "The training raised an error, which is in its last lines.",
    2: "Its last lines say what to fix.",
    126: "The command in the image cannot be executed. Build the image with srccore images build.",
    127: "The image does not contain the command. Build the image with srccore images build.",
    132: "This CPU lacks an instruction that the training uses. Choose newer nodes.",
    134: "A library aborted, often NCCL or CUDA. Check the lines above and the node's driver.",
    135: "Bus error: /dev/shm is full. Increase shared_memory in the profile.",
    137: "It was killed: out of memory, or evicted. Request more memory, or use smaller batches.",
    139: "Segmentation fault: the node's GPU driver may not match the image's CUDA version.",
    143: "It was stopped from outside: the node was drained, or the pod was preempted.",
}


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds, and the limit of lost pods.

    Attributes:
        waiting: Total time in which not all pods run.
        running: Time since all pods run.
        restarts: Number of lost pods.
        refused: In a state that a pod never leaves.
        doubtful: In a state that a pod may leave.
        unclaimed: Without a sign of the operator.
    """

    waiting: float
    running: float
    restarts: int
    refused: float = 20
    doubtful: float = 600
    unclaimed: float = 120

    @classmethod
    def of(cls, settings: JobSettings) -> Limits:
        """The limits in the settings of a job."""
        return cls(
            waiting=settings.waiting_hours * 3600,
            running=settings.running_hours * 3600,
            restarts=settings.max_restarts,
        )


@dataclass(frozen=True)
class Outcome:
    """How a job ended, or why to give it up.

    Attributes:
        what: What happened.
        fix: What to do about it.
        pod: The pod whose log explains more.
        exit_code: The exit code of that pod.
        succeeded: The operator reports success; the output is not checked here.
    """

    what: str = ""
    fix: str = ""
    pod: str | None = None
    exit_code: int | None = None
    succeeded: bool = False


@dataclass(frozen=True)
class Assessment:
    """The present state of a job.

    Attributes:
        message: One line for the log; stays the same as long as nothing changes.
        outcome: None while the job continues.
    """

    message: str
    outcome: Outcome | None = None


@dataclass
class Observer:
    """Assesses one job repeatedly, and remembers what the API server forgets.

    Args:
        launcher: The launcher of the job.
        pods: The number of its pods.
        limits: Its limits.
        waited: Seconds spent waiting before the job existed.
    """

    launcher: Launcher
    pods: int
    limits: Limits
    waited: float = 0
    _seen: set[str] = field(default_factory=set)
    _stuck: dict[tuple[str, str], tuple[datetime, bool]] = field(default_factory=dict)
    _refused_since: datetime | None = None
    _first_look: datetime | None = None
    _looked: datetime | None = None
    _newest: str = ""
    _running_since: datetime | None = None

    def look(
        self,
        job: Object,
        pods: Sequence[Object],
        events: Sequence[Object],
        now: datetime,
        lost: Sequence[Object] = (),
    ) -> Assessment:
        """Assesses a job by its present state.

        Args:
            job: The object.
            pods: Its pods.
            events: Warnings about it and about pods, the oldest first; needed only while pods are
                missing or starting.
            now: The time, with a time zone.
            lost: Pods that were deleted since the last look, in their last state.

        Returns:
            The message, and the outcome once there is one.
        """
        if ended := self._ended(job, pods):
            return ended
        living = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        self._seen |= {pod["metadata"]["uid"] for pod in (*pods, *lost)}
        made = (_to_the_second(pod["metadata"]["creationTimestamp"]) for pod in (*pods, *lost))
        self._newest = max((self._newest, *made))
        running = sum(_is_running(pod) for pod in living)
        self._count_time(job, pods, running >= self.pods, now)
        message = self._message(job, living, events, running)
        outcome = (
            self._out_of_memory([*pods, *lost])
            or self._too_many_restarts(pods)
            or self._never_starts(living, events, now)
            or self._never_made(living, events, now)
            or self._unclaimed(job, living, now)
            or self._out_of_time(running >= self.pods, message, now)
        )
        return Assessment(outcome.what if outcome else message, outcome)

    def _ended(self, job: Object, pods: Sequence[Object]) -> Assessment | None:
        if condition(job, self.launcher.succeeded):
            return Assessment("The job has succeeded.", Outcome(succeeded=True))
        failed = condition(job, "Failed")
        if not failed:
            return None
        outcome = _blame(pods) or Outcome(
            what=f"The job failed: {failed.get('message') or failed.get('reason')}",
            fix="Check the events of the job and its pods with kubectl describe.",
        )
        return Assessment(outcome.what, outcome)

    def _count_time(
        self, job: Object, pods: Sequence[Object], all_run: bool, now: datetime
    ) -> None:
        # Nobody knows how long a job waited that ran before this observer started.
        made = _time(job["metadata"].get("creationTimestamp"), now)
        last = self._looked or (now if _has_run(job, pods) else made)
        if all_run:
            if self._running_since is None:
                # The operator's condition Running is true from the first pod on.
                begun = [_time(text, now) for pod in pods for text in _begun(pod)]
                self._running_since = max(begun, default=now)
        else:
            self.waited += max(0.0, (now - last).total_seconds())
        self._looked = now

    def _out_of_memory(self, pods: Sequence[Object]) -> Outcome | None:
        for pod in pods:
            for state in (*states(pod), *states(pod, "lastState")):
                if state.get("terminated", {}).get("reason") == "OOMKilled":
                    return Outcome(
                        what=f"Pod {_name(pod)} ran out of memory and was killed.",
                        fix="Request more memory (training_memory), or use a smaller "
                        "dpo.batch_size with more dpo.gradient_accumulation_steps.",
                        pod=_name(pod),
                        exit_code=137,
                    )
        return None

    def _too_many_restarts(self, pods: Sequence[Object]) -> Outcome | None:
        if self.restarts(pods) <= self.limits.restarts:
            return None
        return Outcome(
            what=f"Pods were lost {self.restarts(pods)} times; the limit is "
            f"{self.limits.restarts}.",
            fix="Use nodes that are preempted less often, or raise max_restarts.",
        )

    def restarts(self, pods: Sequence[Object]) -> int:
        """How many restarts of pods or containers this observer has seen."""
        inside: int = sum(
            status.get("restartCount", 0)
            for pod in pods
            for status in pod.get("status", {}).get("containerStatuses", [])
        )
        return max(0, len(self._seen) - self.pods) + inside

    def _never_starts(
        self, pods: Sequence[Object], events: Sequence[Object], now: datetime
    ) -> Outcome | None:
        found: dict[tuple[str, str], tuple[str, str, str]] = {}
        for pod in pods:
            for reason, message in _waits(pod, events):
                if reason in NEVER_STARTS:
                    # Pulling and backing off alternate: they count as one reason.
                    key = (pod["metadata"]["uid"], NEVER_STARTS[reason])
                    found[key] = (_name(pod), reason, message)
        before, self._stuck = self._stuck, {}
        for key, (name, reason, message) in found.items():
            since, sure = before.get(key, (now, False))
            # Old nodes report the registry's response only every other time.
            sure = sure or _is_final(key[1], message)
            self._stuck[key] = (since, sure)
            limit = self.limits.refused if sure else self.limits.doubtful
            if (now - since).total_seconds() >= limit:
                why = f"{reason}: {message}".removesuffix(": ")
                what = f"Pod {name} cannot start: {why}"
                return Outcome(what=what, fix=key[1])
        return None

    def _never_made(
        self, pods: Sequence[Object], events: Sequence[Object], now: datetime
    ) -> Outcome | None:
        # Events stay for an hour: ignore those from before the newest pod was created.
        messages = [
            _one_line(event.get("message", ""))
            for event in events
            if happened(event) >= self._newest
        ]
        refused = [
            message
            for message in messages
            if _has_any(message, NEVER_MADE) and not QUOTA.search(message)
        ]
        if pods or not refused:
            self._refused_since = None
            return None
        self._refused_since = self._refused_since or now
        if (now - self._refused_since).total_seconds() < self.limits.refused:
            return None
        fix = "Fix what the message names in the profile, or in the policies of the cluster."
        if "PodSecurity" in refused[-1]:
            fix = (
                "The namespace's label pod-security.kubernetes.io/enforce requires more than the "
                "job's pods fulfil: report this as a bug, or set another label."
            )
        what = f"The job's pods are refused: {refused[-1]}"
        return Outcome(what=what, fix=fix)

    def _unclaimed(self, job: Object, pods: Sequence[Object], now: datetime) -> Outcome | None:
        self._first_look = self._first_look or now
        # A TrainJob has no conditions until it has ended.
        if pods or self._seen or {"conditions", "jobsStatus"} & job.get("status", {}).keys():
            return None
        if (now - self._first_look).total_seconds() < self.limits.unclaimed:
            return None
        return Outcome(
            what=f"No controller has picked up the job for {self.limits.unclaimed:.0f} s.",
            fix=f"Check that {self.launcher.operator} is running and watches this namespace.",
        )

    def _out_of_time(self, all_run: bool, message: str, now: datetime) -> Outcome | None:
        if self.waited > self.limits.waiting and not all_run:
            return Outcome(
                what=f"The job waited for more than {_hours(self.limits.waiting)}. {message}",
                fix="Free some resources, request less, or raise waiting_hours in the profile.",
            )
        since = self._running_since
        if since and (now - since).total_seconds() > self.limits.running:
            return Outcome(
                what=f"The job ran for more than {_hours(self.limits.running)}.",
                fix="Raise timeout_hours of this stage in the profile; the next attempt resumes "
                "from the last checkpoint.",
            )
        return None

    def _message(
        self, job: Object, pods: Sequence[Object], events: Sequence[Object], running: int
    ) -> str:
        lost = self.restarts(pods)
        note = f" (pods lost so far: {lost})" if lost else ""
        if running >= self.pods:
            all_run = "1 pod is running" if running == 1 else f"{running} pods are running"
            return f"{all_run}{note}."
        if condition(job, "Suspended"):
            return f"The job is waiting in its queue{note}."
        why = _one_line(events[-1].get("message", "")) if events else ""
        if not pods:
            return f"The job has no pods yet{note}. {why}".strip()
        why = _why_waiting(pods, events) or why
        return f"{running} of {_pods(self.pods)} running{note}. {why}".strip()


def happened(event: Object) -> str:
    """When it last happened, to the second; the field depends on who reports the event."""
    last = (event.get("series") or {}).get("lastObservedTime")
    made = event["metadata"]["creationTimestamp"]
    return _to_the_second(last or event.get("lastTimestamp") or event.get("eventTime") or made)


def pod_index(launcher: Launcher, pod: Object) -> int:
    """The index of a pod in its job, from 0."""
    labels: dict[str, str] = pod["metadata"].get("labels", {})
    return int(labels.get(launcher.index_label, -1))


def _blame(pods: Sequence[Object]) -> Outcome | None:
    """The pod that failed first: the others failed because of it."""
    failed = []
    for pod in pods:
        for state in states(pod):
            ended = state.get("terminated", {})
            if ended.get("exitCode"):
                failed.append((str(ended.get("finishedAt", "")), pod, ended))
    if not failed:
        for pod in pods:
            status = pod.get("status", {})
            if status.get("phase") == "Failed":
                why = _one_line(f"{status.get('reason', '')}: {status.get('message', '')}")
                what = f"Pod {_name(pod)} failed: {why.strip(': ')}."
                fix = "Check the events of the pod and of its node."
                return Outcome(what=what, fix=fix)
        return None
    _, pod, ended = min(failed, key=lambda each: (each[0], _name(each[1])))
    code = int(ended["exitCode"])
    reason = ended.get("reason", "")
    note = f" ({reason})" if reason not in ("", "Error") else ""
    return Outcome(
        what=f"Pod {_name(pod)} exited with code {code}{note}.",
        fix=EXIT_ADVICE.get(code, EXIT_ADVICE[1]),
        pod=_name(pod),
        exit_code=code,
    )


def _waits(pod: Object, events: Sequence[Object]) -> list[tuple[str, str]]:
    """Why containers of a pod wait: reasons and messages."""
    found = []
    for state in states(pod):
        if reason := state.get("waiting", {}).get("reason"):
            message = state["waiting"].get("message", "")
            if reason == "ContainerCreating":
                # Only events say what a volume lacks.
                uid = pod["metadata"]["uid"]
                of_it = [each for each in events if each["involvedObject"].get("uid") == uid]
                message = of_it[-1].get("message", "") if of_it else message
                if of_it and of_it[-1].get("reason") == "FailedMount" and "not found" in message:
                    reason = "FailedMount"
            found.append((reason, _one_line(message)))
    return found


def _is_final(kind: str, message: str) -> bool:
    """Whether what a pod waits for will certainly not come."""
    if kind is PULLING:
        return _has_any(message.lower(), NEVER_PULLED)
    return kind is not MOUNTING


def _why_waiting(pods: Sequence[Object], events: Sequence[Object]) -> str:
    for pod in sorted(pods, key=_name):
        if _is_running(pod):
            continue
        for reason, message in _waits(pod, events):
            return f"{_name(pod)}: {reason}: {message}".removesuffix(": ")
        for each in pod.get("status", {}).get("conditions", []):
            if each["type"] == "PodScheduled" and each["status"] == "False":
                message = _one_line(each.get("message", ""))
                return f"{_name(pod)} cannot be scheduled: {message}"
        return f"{_name(pod)} is {pod.get('status', {}).get('phase', 'Pending')}."
    return ""


def _is_running(pod: Object) -> bool:
    """Whether it is running or has succeeded: a job's pods do not end at the same moment."""
    phase = pod.get("status", {}).get("phase")
    done = [state.get("terminated", {}).get("exitCode") == 0 for state in states(pod)]
    return phase == "Succeeded" or (
        phase == "Running"
        and all(ok or "running" in state for ok, state in zip(done, states(pod), strict=True))
    )


def _has_run(job: Object, pods: Sequence[Object]) -> bool:
    conditions = job.get("status", {}).get("conditions") or []
    return any(each["type"] in ("Running", "Restarting") for each in conditions) or any(
        {"running", "terminated"} & state.keys() for pod in pods for state in states(pod)
    )


def _begun(pod: Object) -> list[str]:
    """When its containers started."""
    known = (state.get("running") or state.get("terminated") or {} for state in states(pod))
    return [each["startedAt"] for each in known if each.get("startedAt")]


def states(pod: Object, which: str = "state") -> list[Object]:
    """The states of a pod's containers."""
    return [each.get(which, {}) for each in pod.get("status", {}).get("containerStatuses", [])]


def condition(job: Object, name: str) -> Object | None:
    """A condition whose status is True: a job keeps former conditions with another status."""
    for each in job.get("status", {}).get("conditions") or []:
        if each.get("type") == name and each.get("status") == "True":
            return dict(each)
    return None


def _to_the_second(time_stamp: str) -> str:
    return time_stamp[:19]


def _time(text: str | None, now: datetime) -> datetime:
    """A time of the cluster, whose clock may be slightly ahead of ours."""
    if not text:
        return now
    return min(now, datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC))


def _has_any(text: str, words: Sequence[str]) -> bool:
    return any(word in text for word in words)


def _name(pod: Object) -> str:
    return str(pod["metadata"]["name"])


def _pods(count: int) -> str:
    return "1 pod" if count == 1 else f"{count} pods"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:g} h" if seconds >= 3600 else f"{seconds:g} s"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
