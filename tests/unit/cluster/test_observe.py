"""How the state of a training job is assessed: objects and times in, an assessment out."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from srccore.cluster.observe import Assessment, Limits, Observer, pod_index
from srccore.cluster.request import PYTORCHJOB, TRAINJOB, JobSettings, Launcher

Object = dict[str, Any]

BEGAN = datetime(2026, 3, 1, 12, tzinfo=UTC)
LIMITS = Limits(waiting=7200, running=36000, restarts=2, refused=20, doubtful=600, unclaimed=120)
CREATED = {"type": "Created", "status": "True"}


def at(seconds: float) -> datetime:
    return BEGAN + timedelta(seconds=seconds)


def stamp(seconds: float) -> str:
    return at(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


def job(*conditions: Object) -> Object:
    status = {"conditions": list(conditions)} if conditions else {}
    return {"metadata": {"name": "job", "creationTimestamp": stamp(0)}, "status": status}


def holds(name: str, since: float = 0, **more: str) -> Object:
    return {"type": name, "status": "True", "lastTransitionTime": stamp(since), **more}


def pod(
    index: int = 0,
    state: Object | None = None,
    *,
    phase: str = "Pending",
    uid: str = "",
    going: bool = False,
    made: float = 0,
    restarts: int = 0,
    **status: Any,
) -> Object:
    metadata = {
        "name": f"job-worker-{index}",
        "uid": uid or f"uid-{index}",
        "labels": {PYTORCHJOB.index_label: str(index)},
        "creationTimestamp": stamp(made),
    }
    if going:
        metadata["deletionTimestamp"] = stamp(0)
    if state is not None:
        status["containerStatuses"] = [
            {"name": "pytorch", "state": state, "restartCount": restarts}
        ]
    return {"metadata": metadata, "status": {"phase": phase, **status}}


def runs(index: int = 0, since: float | None = None, **more: Any) -> Object:
    running = {} if since is None else {"startedAt": stamp(since)}
    return pod(index, {"running": running}, phase="Running", **more)


def waits(reason: str, message: str = "", index: int = 0, **more: Any) -> Object:
    return pod(index, {"waiting": {"reason": reason, "message": message}}, **more)


def ended(code: int, index: int = 0, when: float = 0, reason: str = "Error", **more: Any) -> Object:
    state = {"terminated": {"exitCode": code, "reason": reason, "finishedAt": stamp(when)}}
    return pod(index, state, phase="Failed" if code else "Succeeded", **more)


def warning(
    message: str, reason: str = "FailedCreatePod", uid: str = "job", when: float = 0
) -> Object:
    return {
        "metadata": {"creationTimestamp": stamp(when)},
        "reason": reason,
        "message": message,
        "involvedObject": {"uid": uid},
    }


def observer(pods: int = 1, **limits: float) -> Observer:
    return Observer(PYTORCHJOB, pods, Limits(**{**vars(LIMITS), **limits}))


def looks(
    by: Observer, seconds: float, pods: list[Object], *events: Object, of: Object | None = None
) -> Assessment:
    return by.look(of or job(CREATED), pods, events, at(seconds))


def given_up(assessment: Assessment) -> str:
    """Why a job is given up, and what to do."""
    outcome = assessment.outcome
    assert outcome is not None
    assert not outcome.succeeded
    assert assessment.message == outcome.what
    return f"{outcome.what} {outcome.fix}"


# What is said


@pytest.mark.parametrize(
    ("pods", "events", "says"),
    [
        ([], [], "The job has no pods yet."),
        ([], [warning("first"), warning("so it  is")], "The job has no pods yet. so it is"),
        ([pod()], [], "0 of 2 pods running. job-worker-0 is Pending."),
        (
            [runs(0), waits("ContainerCreating", index=1)],
            [],
            "1 of 2 pods running. job-worker-1: ContainerCreating",
        ),
        (
            [runs(0), waits("Odd", "It is\nso.", index=1)],
            [],
            "1 of 2 pods running. job-worker-1: Odd: It is so.",
        ),
        ([runs(0)], [warning("exceeded quota")], "1 of 2 pods running. exceeded quota"),
        ([runs(0), runs(1)], [], "2 pods are running."),
        ([runs(0), ended(0, 1)], [], "2 pods are running."),
        ([runs(0), runs(1, going=True)], [], "1 of 2 pods running."),
    ],
)
def test_one_line_says_how_far_a_job_is(
    pods: list[Object], events: list[Object], says: str
) -> None:
    assert looks(observer(2), 1, pods, *events) == Assessment(says)


def test_a_pod_that_finds_no_node_says_why() -> None:
    unscheduled = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    }
    seen = looks(observer(), 1, [pod(conditions=[unscheduled])])
    assert seen.message == (
        "0 of 1 pod running. job-worker-0 cannot be scheduled: "
        "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    )


def test_a_suspended_job_waits_in_its_queue() -> None:
    seen = looks(observer(), 1, [], of=job(CREATED, holds("Suspended")))
    assert seen == Assessment("The job is waiting in its queue.")


def test_a_condition_that_holds_no_more_is_none() -> None:
    resumed = {"type": "Suspended", "status": "False"}
    seen = looks(observer(), 1, [runs()], of=job(CREATED, resumed))
    assert seen == Assessment("1 pod is running.")


# How it ends


def test_a_pod_that_has_done_its_part_is_not_missing() -> None:
    done = pod(0, {"terminated": {"exitCode": 0, "reason": "Completed"}}, phase="Running")
    seen = observer(2).look(job(CREATED), [done, runs(1)], [], at(60))
    assert seen == Assessment("2 pods are running.")


@pytest.mark.parametrize(("launcher", "name"), [(PYTORCHJOB, "Succeeded"), (TRAINJOB, "Complete")])
def test_success_is_the_condition_of_the_kind(launcher: Launcher, name: str) -> None:
    by = Observer(launcher, 1, LIMITS)
    other = {"Succeeded": "Complete", "Complete": "Succeeded"}[name]
    assert by.look(job(holds(other)), [runs()], [], at(1)).outcome is None
    outcome = by.look(job(holds(name)), [], [], at(1)).outcome
    assert outcome is not None
    assert outcome.succeeded


def test_the_pod_that_failed_first_is_blamed() -> None:
    pods = [ended(1, 0, when=9), ended(2, 1, when=8), ended(0, 2, when=7)]
    outcome = looks(observer(3), 10, pods, of=job(holds("Failed"))).outcome
    assert outcome is not None
    assert (outcome.pod, outcome.exit_code) == ("job-worker-1", 2)
    assert outcome.what == "Pod job-worker-1 exited with code 2."


@pytest.mark.parametrize(
    ("code", "reason", "says", "advice"),
    [
        (1, "Error", r"exited with code 1\.", "raised an error"),
        (2, "Error", r"exited with code 2\.", "what to fix"),
        (127, "StartError", r"exited with code 127 \(StartError\)\.", "srccore images build"),
        (135, "Error", "exited with code 135", "shared_memory"),
        (137, "OOMKilled", r"exited with code 137 \(OOMKilled\)", "more memory"),
        (139, "Error", "exited with code 139", "driver"),
        (143, "Error", "exited with code 143", "drained"),
        (77, "Error", "exited with code 77", "raised an error"),
    ],
)
def test_an_exit_code_comes_with_advice(code: int, reason: str, says: str, advice: str) -> None:
    seen = looks(observer(), 1, [ended(code, reason=reason)], of=job(holds("Failed")))
    assert seen.outcome is not None
    assert seen.outcome.exit_code == code
    assert re.search(f"{says}.*{advice}", given_up(seen))


def test_a_pod_that_failed_as_a_whole_says_why() -> None:
    evicted = pod(phase="Failed", reason="Evicted", message="The node was low on\nresource: disk.")
    seen = looks(observer(), 1, [evicted], of=job(holds("Failed")))
    assert "job-worker-0 failed: Evicted: The node was low on resource: disk" in given_up(seen)


def test_a_failed_job_without_a_failed_pod_says_what_the_operator_says() -> None:
    failed = holds("Failed", reason="PyTorchJobFailed", message="the deadline is over")
    assert "The job failed: the deadline is over" in given_up(
        looks(observer(), 1, [], of=job(failed))
    )


def test_a_pod_out_of_memory_is_final() -> None:
    text = given_up(looks(observer(), 1, [ended(137, reason="OOMKilled")]))
    assert "job-worker-0 ran out of memory" in text
    assert "training_memory" in text


def test_a_pod_out_of_memory_is_final_also_where_it_is_gone_or_has_begun_anew() -> None:
    dead = ended(137, reason="OOMKilled", uid="before")
    seen = observer().look(job(CREATED), [pod()], [], at(1), [dead])
    assert "ran out of memory" in given_up(seen)
    again = runs()
    again["status"]["containerStatuses"][0]["lastState"] = {"terminated": {"reason": "OOMKilled"}}
    assert "ran out of memory" in given_up(looks(observer(), 1, [again]))


# Pods that are lost


def test_pods_made_anew_are_counted_and_no_more_than_so_many() -> None:
    by = observer(2)
    assert looks(by, 0, [runs(0), runs(1)]).message == "2 pods are running."
    assert looks(by, 1, [runs(0), ended(143, 1)]).outcome is None
    message = looks(by, 2, [runs(0), pod(1, uid="b")]).message
    assert message.startswith("1 of 2 pods running (pods lost so far: 1). job-worker-1 is Pending")
    message = looks(by, 3, [runs(0), runs(1, uid="c")]).message
    assert message == "2 pods are running (pods lost so far: 2)."
    seen = looks(by, 4, [runs(0), runs(1, uid="d")])
    assert "Pods were lost 3 times; the limit is 2." in given_up(seen)


def test_a_container_that_began_anew_in_its_pod_counts_too() -> None:
    by = observer()
    assert looks(by, 0, [runs(restarts=2)]).outcome is None
    assert "lost 3 times" in given_up(looks(by, 1, [runs(restarts=3)]))


def test_a_pod_that_came_and_went_between_two_looks_counts() -> None:
    by = observer(restarts=0)
    assert looks(by, 0, [runs(uid="a")]).outcome is None
    seen = by.look(job(CREATED), [runs(uid="a")], [], at(1), [ended(143, uid="b")])
    assert "lost 1 times" in given_up(seen)


# Pods that never start


def test_a_container_that_cannot_be_set_up_is_given_up_soon() -> None:
    by = observer()
    stuck = [waits("CreateContainerConfigError", 'secret "s3" not found')]
    assert looks(by, 100, stuck).outcome is None
    assert looks(by, 119, stuck).outcome is None
    text = given_up(looks(by, 120, stuck))
    assert 'cannot start: CreateContainerConfigError: secret "s3" not found' in text
    assert "Secret or ConfigMap" in text


def test_pulling_and_backing_off_are_one_wait() -> None:
    by = observer()
    for second in range(0, 20, 2):
        reason = "ErrImagePull" if second % 4 else "ImagePullBackOff"
        assert looks(by, second, [waits(reason, "x:1: not found")]).outcome is None
    text = given_up(looks(by, 20, [waits("ImagePullBackOff", "x:1: not found")]))
    assert "cannot start: ImagePullBackOff: x:1: not found" in text
    assert "image_pull_secrets" in text


def test_a_node_that_says_why_in_every_other_turn_is_believed() -> None:
    by = observer()
    looks(by, 0, [waits("ErrImagePull", "x:1: not found")])
    text = given_up(looks(by, 20, [waits("ImagePullBackOff", 'Back-off pulling image "x:1"')]))
    assert 'Back-off pulling image "x:1"' in text


def test_a_registry_that_does_not_answer_may_come_back() -> None:
    by = observer()
    away = [waits("ErrImagePull", "dial tcp 10.0.0.1:443: i/o timeout")]
    assert looks(by, 0, away).outcome is None
    assert looks(by, 599, away).outcome is None
    assert "i/o timeout" in given_up(looks(by, 600, away))


def test_a_volume_that_is_missing_may_come_and_is_named() -> None:
    by = observer()
    missing = warning('volume "ca": configmap "trusted" not found', "FailedMount", "uid-0")
    said = looks(by, 0, [waits("ContainerCreating")], missing).message
    assert 'FailedMount: volume "ca": configmap "trusted" not found' in said
    assert looks(by, 599, [waits("ContainerCreating")], missing).outcome is None
    text = given_up(looks(by, 600, [waits("ContainerCreating")], missing))
    assert 'cannot start: FailedMount: volume "ca": configmap "trusted" not found' in text
    assert "Create the ConfigMap, Secret or claim" in text


@pytest.mark.parametrize(
    "event",
    [
        warning('configmap "trusted" not found', "FailedMount", "another pod's"),
        warning("the volume is attached to another node", "FailedAttachVolume", "uid-0"),
    ],
)
def test_another_warning_is_told_at_most(event: Object) -> None:
    by = observer()
    for second in (0, 700):
        assert looks(by, second, [waits("ContainerCreating")], event).outcome is None


def test_a_pod_that_starts_after_all_is_forgiven() -> None:
    by = observer()
    stuck = [waits("CreateContainerConfigError")]
    assert looks(by, 0, stuck).outcome is None
    assert looks(by, 10, [waits("ContainerCreating")]).outcome is None
    assert looks(by, 20, stuck).outcome is None
    assert "cannot start: CreateContainerConfigError" in given_up(looks(by, 40, stuck))


def test_a_pod_that_is_going_is_not_waited_for() -> None:
    by = observer()
    for second in (0, 30):
        stuck = waits("CreateContainerConfigError", going=True)
        assert looks(by, second, [stuck]).outcome is None


# Pods that are never made


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (
            'Error creating: pods "job-worker-0" is forbidden: violates PodSecurity '
            '"restricted:latest": runAsNonRoot != true',
            "pod-security.kubernetes.io/enforce",
        ),
        (
            'Error creating: admission webhook "gate.example.com" denied the request: no label',
            "denied the request: no label",
        ),
        (
            "Error creating: pods \"job-worker-0\" is forbidden: ValidatingAdmissionPolicy 'gate' "
            "with binding 'gate' denied request: no label",
            "denied request: no label",
        ),
        (
            'Error creating: pods "job-worker-0" is forbidden: error looking up service account '
            'ns/nobody: serviceaccount "nobody" not found',
            "nobody",
        ),
        (
            'Error creating: pods "job-worker-0" is forbidden: no PriorityClass with name gone',
            "PriorityClass",
        ),
        ('Error creating: Pod "job-worker-0" is invalid: spec.volumes', "is invalid"),
    ],
)
def test_pods_that_are_always_refused_are_not_waited_for(message: str, says: str) -> None:
    by = observer()
    assert looks(by, 0, [], warning(message)).outcome is None
    assert looks(by, 19, [], warning(message)).outcome is None
    text = given_up(looks(by, 20, [], warning(message)))
    assert "The job's pods are refused: Error creating" in text
    assert says in text


@pytest.mark.parametrize(
    "message",
    [
        'Error creating: pods "job-worker-0" is forbidden: exceeded quota: gpus, requested: '
        "requests.nvidia.com/gpu=8, used: 8, limited: 8",
        'Error creating: Internal error occurred: failed calling webhook "gate.example.com"',
    ],
)
def test_what_may_pass_is_waited_for(message: str) -> None:
    by = observer()
    for second in (0, 30, 3600):
        seen = looks(by, second, [], warning(message))
        assert seen.outcome is None
        assert message[:60] in seen.message


def test_pods_that_are_made_after_all_are_forgiven() -> None:
    by = observer()
    refused = warning('pods "job-worker-0" is forbidden: violates PodSecurity')
    assert looks(by, 0, [], refused).outcome is None
    assert looks(by, 30, [pod()], refused).outcome is None
    assert looks(by, 31, [], refused).outcome is None
    assert looks(by, 50, [], refused).outcome is None
    assert "refused" in given_up(looks(by, 51, [], refused))


# The clocks


def test_a_job_that_nobody_takes_up_is_given_up() -> None:
    by = observer()
    assert looks(by, 0, [], of=job()).outcome is None
    assert looks(by, 119, [], of=job()).outcome is None
    text = given_up(looks(by, 120, [], of=job()))
    assert "No controller has picked up the job for 120 s." in text
    assert "the Training Operator" in text


@pytest.mark.parametrize(("pods", "conditions"), [([pod()], ()), ([], (CREATED,))])
def test_a_pod_or_a_condition_is_a_sign_of_the_operator(
    pods: list[Object], conditions: tuple[Object, ...]
) -> None:
    by = observer()
    for second in (0, 200):
        assert looks(by, second, pods, of=job(*conditions)).outcome is None


def test_a_clock_of_the_cluster_that_is_behind_ours_gives_nothing_up() -> None:
    by = observer()
    assert looks(by, 600, [], of=job()).outcome is None


def test_waiting_is_counted_over_all_waits_and_not_while_all_run() -> None:
    by = observer(waiting=100, restarts=9)
    looks(by, 60, [pod()])  # 60 s since the job was made
    looks(by, 61, [runs()])
    looks(by, 1000, [runs()])
    assert looks(by, 1030, [pod(uid="b")]).outcome is None  # 90 s
    text = given_up(looks(by, 1041, [pod(uid="b")]))  # 101 s
    assert "waited for more than 100 s. 0 of 1 pod running" in text
    assert "waiting_hours" in text


def test_a_job_that_runs_in_the_end_has_not_waited_too_long() -> None:
    by = observer(waiting=100)
    looks(by, 99, [pod()])
    assert looks(by, 300, [runs()]).outcome is None


@pytest.mark.parametrize(
    ("pods", "conditions"),
    [
        ([pod()], (CREATED, holds("Restarting", 40000))),
        ([pod()], (CREATED, {"type": "Running", "status": "False"})),
        ([ended(143)], (CREATED,)),
    ],
)
def test_a_job_that_has_run_before_we_came_has_not_waited_since_it_was_made(
    pods: list[Object], conditions: tuple[Object, ...]
) -> None:
    by = observer()
    assert looks(by, 40000, pods, of=job(*conditions)).outcome is None
    assert looks(by, 47000, pods, of=job(*conditions)).outcome is None
    assert "waited" in given_up(looks(by, 47300, pods, of=job(*conditions)))


def test_running_is_counted_from_when_all_run() -> None:
    by = observer(2, running=100)
    looks(by, 0, [runs(0), pod(1)])
    looks(by, 50, [runs(0), runs(1)])
    assert looks(by, 149, [runs(0), runs(1)]).outcome is None
    text = given_up(looks(by, 151, [runs(0), runs(1)]))
    assert "ran for more than 100 s." in text
    assert "Raise timeout_hours of this stage" in text


def test_running_counts_what_ran_before_we_came() -> None:
    by = observer()
    running = job(CREATED, holds("Running", 10))
    assert looks(by, 36000, [runs(since=10)], of=running).outcome is None
    assert "ran for more than 10 h." in given_up(looks(by, 36011, [runs(since=10)], of=running))


def test_running_is_counted_from_the_last_pod_though_the_operator_counts_from_the_first() -> None:
    by = observer(2, running=3600)
    running = job(CREATED, holds("Running", 1))
    late = [runs(0, since=1), runs(1, since=3500)]
    assert looks(by, 3600, late, of=running).outcome is None
    assert looks(by, 7099, late, of=running).outcome is None
    assert "ran for more than 1 h." in given_up(looks(by, 7101, late, of=running))


def test_a_clock_of_the_cluster_that_is_ahead_of_ours_shortens_nothing() -> None:
    by = observer()
    running = job(CREATED, holds("Running", 500))
    assert looks(by, 10, [runs(since=500)], of=running).outcome is None
    assert looks(by, 36009, [runs(since=500)], of=running).outcome is None
    assert looks(by, 36011, [runs(since=500)], of=running).outcome is not None


def test_what_was_waited_for_quota_before_there_was_a_job_counts() -> None:
    by = Observer(PYTORCHJOB, 1, LIMITS, waited=7000)
    assert looks(by, 199, []).outcome is None
    assert "waited for more than 2 h" in given_up(looks(by, 201, []))


# The rest


def test_a_trainjob_that_has_jobs_was_taken_up_though_it_has_no_conditions() -> None:
    by = Observer(TRAINJOB, 1, LIMITS)
    taken = {**job(), "status": {"jobsStatus": [{"name": "node", "active": 1}]}}
    assert looks(by, 1, [], of=taken).outcome is None
    assert looks(by, 500, [], of=taken).outcome is None


def test_a_trainjob_whose_only_pod_is_drained_was_taken_up() -> None:
    by = Observer(TRAINJOB, 1, LIMITS)
    assert looks(by, 1, [runs()], of=job()).outcome is None
    assert looks(by, 500, [runs(going=True)], of=job()).outcome is None
    assert looks(by, 501, [], of=job()).outcome is None


def test_a_quota_that_is_not_counted_yet_refuses_nothing_for_good() -> None:
    by = observer()
    message = 'pods "job-worker-0" is forbidden: status unknown for quota: srccore'
    for seconds in (0, 30, 300):
        seen = looks(by, seconds, [], warning(message))
        assert seen == Assessment(f"The job has no pods yet. {message}")


def test_why_a_pod_was_refused_counts_no_more_once_it_has_come() -> None:
    by = observer()
    refused = 'pods "job-worker-0" is forbidden: violates PodSecurity "restricted:v1.34"'
    assert looks(by, 1, [], warning(refused)).outcome is None
    assert looks(by, 10, [runs(made=9)], warning(refused)).outcome is None
    for seconds in (1000, 1050):
        assert looks(by, seconds, [], warning(refused)).outcome is None
    again = (warning(refused), warning(refused, when=1051))
    assert looks(by, 1051, [], *again).outcome is None
    assert "PodSecurity" in given_up(looks(by, 1080, [], *again))


def test_limits_are_those_of_the_settings() -> None:
    settings = JobSettings(image="x", waiting_hours=2, running_hours=10, max_restarts=2)
    assert Limits.of(settings) == LIMITS


def test_a_pod_knows_its_index_by_the_label_of_its_kind() -> None:
    assert pod_index(PYTORCHJOB, pod(3)) == 3
    assert pod_index(TRAINJOB, pod(3)) == -1
    assert pod_index(PYTORCHJOB, {"metadata": {}}) == -1
