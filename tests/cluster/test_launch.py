"""The training job's client against a real API server, with the faults that each case requires.

There is a proxy between the two, and a test controller plays operator and kubelet. Quotas, roles,
namespaces, admission, garbage collection and the API server's own restarts are real. The client
has exactly the permissions of the shipped Role, in a namespace with Pod Security ``restricted``.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from cluster.clusters import Cluster
from cluster.job_controller import Administrator, JobController, PodLogs, configuration
from cluster.processes import wait_until
from cluster.proxy import (
    Fault,
    Proxy,
    Rule,
    answer,
    drop,
    error_event,
    forward,
    lose_answer,
    say_nothing,
    stall,
)
from kubernetes import client

from srccore.cluster import api as api_module
from srccore.cluster import launch as launch_module
from srccore.cluster.api import Api
from srccore.cluster.launch import JobFailed, Launch, Stopped
from srccore.cluster.observe import Limits
from srccore.cluster.request import (
    PYTORCHJOB,
    TRAINJOB,
    JobSettings,
    Launcher,
    Owner,
    TrainingJobRequest,
)
from srccore.errors import UserError

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

Object = dict[str, Any]
Step = Callable[["Scene"], None]

ROLE = Path(__file__).parents[2] / "manifests/base/role.yaml"
ACCOUNT = "srccore-launcher"
ARGO = "argoproj.io/v1alpha1"
RBAC = "/apis/rbac.authorization.k8s.io/v1"
ADMISSION = "/apis/admissionregistration.k8s.io/v1"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
WATCHED = r"/(pytorchjobs|pods)$"
LOGS = r"/pods/[^/]+/log$"
LIMITS = Limits(waiting=120, running=120, restarts=2, refused=0.5, doubtful=1, unclaimed=120)
WITHIN = 60.0
"""Seconds for anything to happen on a busy machine."""
_RUNS = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class Case:
    """What happens to one launch, and how it ends.

    Args:
        name: A sentence.
        before: What happens before it starts.
        steps: What happens then.
        ends: The exception that it ends with; None means success.
        says: Texts in its log or in its exception.
        left: The attempts whose jobs are left in the end.
    """

    name: str
    before: tuple[Step, ...] = ()
    steps: tuple[Step, ...] = ()
    ends: type[BaseException] | None = None
    says: tuple[str, ...] = ()
    left: tuple[int, ...] = (1,)


class Scene:
    """One launch, and everything around it that a test moves."""

    def __init__(
        self, cluster: Cluster, proxy: Proxy, namespace: str, patch: pytest.MonkeyPatch
    ) -> None:
        self.cluster = cluster
        self.proxy = proxy
        self.namespace = namespace
        self.patch = patch
        self.admin = Administrator(cluster)
        self.run = f"t{next(_RUNS)}"
        self.launcher: Launcher = PYTORCHJOB
        self.settings: Object = {"image": "image"}
        # A test changes them once the limit is the next thing to happen.
        self.limits = SimpleNamespace(**vars(LIMITS))
        self.outage = WITHIN
        self.attempt = 1
        self.published = False
        self.logs = PodLogs()
        self.told: list[str] = []
        self.lines: list[str] = []
        self.error: BaseException | None = None
        self.rule: Rule | None = None
        self.launch: Launch | None = None
        self._thread = threading.Thread(target=self._launched)
        self._token = ""
        self._workflow: Object | None = None
        proxy.add(self.logs, path=LOGS)

    # Its objects

    @property
    def token(self) -> str:
        """The token of the step's account."""
        if not self._token:
            self._token = self.cluster.token_for(self.namespace, ACCOUNT)
        return self._token

    @token.setter
    def token(self, token: str) -> None:
        self._token = token

    @property
    def workflow(self) -> str:
        """The path of the Workflow that the job belongs to."""
        path = f"/apis/{ARGO}/namespaces/{self.namespace}/workflows"
        if self._workflow is None:
            body = {"metadata": {"name": f"workflow-{self.run}"}, "spec": {}}
            body = {"apiVersion": ARGO, "kind": "Workflow", **body}
            self._workflow = self.admin.ask("POST", path, body)
        return f"{path}/{self._workflow['metadata']['name']}"

    @property
    def request(self) -> TrainingJobRequest:
        assert self.workflow
        assert self._workflow is not None
        owner = {key: self._workflow["metadata"][key] for key in ("name", "uid")}
        return TrainingJobRequest(
            stage="train-dpo",
            run=self.run,
            namespace=self.namespace,
            task="{}",
            settings=JobSettings.model_validate(self.settings),
            owner=Owner(**owner),
        )

    @property
    def pods(self) -> int:
        return int(self.settings.get("pods", 1))

    @property
    def jobs(self) -> str:
        return f"/apis/kubeflow.org/v1/namespaces/{self.namespace}/pytorchjobs"

    @property
    def job(self) -> JobController:
        """The controller of the job of the present attempt, once it exists."""
        name = self.request.name(self.attempt)
        self.wait_until(f"{name} is there", lambda: self.admin.is_there(f"{self.jobs}/{name}"))
        return JobController(self.admin, self.namespace, name, self.logs)

    def left(self) -> tuple[int, ...]:
        """The attempts whose jobs exist."""
        found = self.admin.ask("GET", self.jobs, labelSelector=f"srccore.dev/run={self.run}")
        names = [each["metadata"]["name"] for each in found["items"]]
        return tuple(sorted(int(name.rpartition("-a")[2]) for name in names))

    # The launch

    def begin(self) -> None:
        settings = configuration(self.proxy.url, self.token)
        self.launch = Launch(
            Api(client.ApiClient(settings), self.namespace),
            self.launcher,
            self.request,
            self.limits,
            lambda: self.published,
            say=self.lines.append,
            outage=self.outage,
        )
        self._thread.start()

    def _launched(self) -> None:
        assert self.launch is not None
        try:
            self.launch.run()
        except (UserError, JobFailed, Stopped) as error:
            self.error = error

    def join(self) -> None:
        """Waits for the launch to end."""
        self.wait_until("the launch ends", lambda: not self._thread.is_alive())

    def close(self) -> None:
        """Stops it, and deletes what is left."""
        if self.launch:
            self.launch.stop()
            self.proxy.cut()
            self._thread.join(WITHIN)
        for attempt in self.left():
            self.admin.delete(f"{self.jobs}/{self.request.name(attempt)}")

    def wait_until(self, what: str, ready: Callable[[], bool]) -> None:
        """Waits for a condition; on a timeout, shows the log so far."""
        try:
            wait_until(what, ready, within=WITHIN)
        except Exception as error:
            raise AssertionError("\n".join([str(error), *self.lines, repr(self.error)])) from None

    def hear(self, text: str) -> None:
        """Waits until the launch logs a text."""
        self.wait_until(f"it says {text!r}", lambda: any(text in line for line in self.lines))


# Steps: the launch


def asks_for(**settings: Any) -> Step:
    return lambda scene: scene.settings.update(settings)


def limited(**limits: float) -> Step:
    return lambda scene: vars(scene.limits).update(limits)


def outage(seconds: float) -> Step:
    return lambda scene: setattr(scene, "outage", seconds)


def as_trainjob(scene: Scene) -> None:
    scene.launcher = TRAINJOB


def attempt(number: int) -> Step:
    return lambda scene: setattr(scene, "attempt", number)


def hears(text: str) -> Step:
    return lambda scene: scene.hear(text)


def ended(scene: Scene) -> None:
    scene.join()


def stop(scene: Scene) -> None:
    assert scene.launch is not None
    scene.launch.stop()


def waits_long_for_logs(scene: Scene) -> None:
    scene.patch.setattr(launch_module, "REST_OF_LOG_SECONDS", 1000)


def is_judged(scene: Scene) -> None:
    """The launch requests the job again before it accepts that it has failed."""
    name = scene.request.name(scene.attempt)
    scene.wait_until("it asks", lambda: scene.proxy.count("GET", f"/pytorchjobs/{name}$") > 0)


# Steps: operator, kubelet and store


def job(move: str, *args: Any) -> Step:
    """A move of the test controller."""
    return lambda scene: getattr(scene.job, move)(*args)


def takes_up(scene: Scene) -> None:
    """The operator creates the pods, and they wait."""
    scene.job.take_up()
    scene.job.make_pods()
    scene.hear(f"0 of {scene.pods} pod")


def runs(scene: Scene) -> None:
    """All pods are running, and the launch knows it."""
    scene.job.run(*range(scene.pods))
    scene.hear("1 pod is running" if scene.pods == 1 else f"{scene.pods} pods are running")


def is_running(scene: Scene) -> None:
    takes_up(scene)
    runs(scene)


def tells(*texts: str) -> Step:
    """The first pod logs some lines, and the launch shows them."""

    def step(scene: Scene) -> None:
        scene.told += texts
        scene.logs.say(scene.job.pod(0), *texts)
        scene.hear(texts[-1])

    return step


def publishes(scene: Scene) -> None:
    scene.published = True


def succeeds(scene: Scene) -> None:
    publishes(scene)
    scene.job.end(0, 0)
    scene.job.succeed()


# Steps: the connection


def spoilt(
    fault: Fault,
    method: str = "GET|POST|DELETE",
    path: str = "",
    times: float = float("inf"),
    **query: str,
) -> Step:
    def step(scene: Scene) -> None:
        scene.rule = scene.proxy.add(fault, method, path, times, **query)

    return step


def met(scene: Scene) -> None:
    """A request has met the fault."""
    assert scene.rule is not None
    scene.rule.wait(WITHIN)


def mended(scene: Scene) -> None:
    assert scene.rule is not None
    scene.rule.remove()


def loses_watches(fault: Fault) -> Step:
    """Both watches are cut, or not open yet; the next ones meet a fault."""

    def step(scene: Scene) -> None:
        # For these two only, a silence this long is a lost connection.
        scene.patch.setattr(api_module, "SILENCE_SECONDS", 1)
        scene.rule = scene.proxy.add(fault, "GET", WATCHED, 2, watch="true")
        scene.proxy.cut(WATCHED)

    return step


def both_met(scene: Scene) -> None:
    scene.wait_until("both meet the fault", lambda: scene.rule is None or scene.rule.left <= 0)
    scene.patch.setattr(api_module, "SILENCE_SECONDS", 75)


def loses_log(scene: Scene) -> None:
    scene.proxy.cut(LOGS)


def loses_all(scene: Scene) -> None:
    scene.proxy.cut()


def api_server_stops(scene: Scene) -> None:
    assert scene.request
    assert scene.token
    scene.cluster.stop("kube-apiserver")


def api_server_restarts(scene: Scene) -> None:
    scene.cluster.restart_api_server()


# Steps: the cluster


def made_before(**settings: Any) -> Step:
    """An earlier attempt of the step has created the job, perhaps with another specification."""

    def step(scene: Scene) -> None:
        mine, scene.settings = scene.settings, {**scene.settings, **settings}
        scene.admin.ask("POST", scene.jobs, scene.request.to_object(PYTORCHJOB, 1))
        scene.settings = mine

    return step


def job_changed(**container: Any) -> Step:
    """Somebody has changed the job's container, but not its annotation."""

    def step(scene: Scene) -> None:
        job = scene.admin.ask("GET", scene.job.path)
        template = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
        template["spec"]["containers"][0].update(container)
        scene.admin.ask("PUT", scene.job.path, job)

    return step


def job_placed(scene: Scene) -> None:
    """Kueue has admitted the job and written it again."""
    job = scene.admin.ask("GET", scene.job.path)
    job["spec"]["runPolicy"]["suspend"] = False
    template = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    template["metadata"]["labels"]["kueue.x-k8s.io/podset"] = "worker"
    template["spec"]["nodeSelector"] = {"flavour": "spot"}
    template["spec"]["tolerations"] = [{"key": "spot", "operator": "Exists"}]
    scene.admin.ask("PUT", scene.job.path, job)


def stranger(scene: Scene) -> None:
    """A pod of somebody else has the labels of the job's first pod."""
    job = scene.job
    labels = {PYTORCHJOB.job_label: job.name, PYTORCHJOB.index_label: "0"}
    template = scene.request.pod("pytorch")
    pod = {"metadata": {"name": f"stranger-{scene.run}", "labels": labels}, "spec": template}
    scene.admin.ask("POST", f"/api/v1/namespaces/{scene.namespace}/pods", pod)


def job_held(scene: Scene) -> None:
    """A finalizer keeps the job when it is deleted."""
    body = {"metadata": {"finalizers": ["example.com/held"]}}
    scene.admin.ask("PATCH", scene.job.path, body)


def job_let_go(scene: Scene) -> None:
    scene.admin.ask("PATCH", scene.job.path, {"metadata": {"finalizers": None}})


def workflow(**changes: Any) -> Step:
    def step(scene: Scene) -> None:
        scene.admin.ask("PATCH", scene.workflow, changes)

    return step


def workflow_deleted(scene: Scene) -> None:
    scene.admin.delete(scene.workflow)


def own_namespace(scene: Scene) -> None:
    scene.namespace = f"launch-{scene.run}"
    make_namespace(scene.admin, scene.namespace)


def namespace_deleted(scene: Scene) -> None:
    assert scene.request
    assert scene.token
    scene.admin.delete(f"/api/v1/namespaces/{scene.namespace}")


def namespace_held(scene: Scene) -> None:
    """A finalizer keeps something in the namespace."""
    path = f"/api/v1/namespaces/{scene.namespace}/configmaps"
    body = {"metadata": {"name": "held", "finalizers": ["example.com/held"]}}
    scene.admin.ask("POST", path, body)


def namespace_let_go(scene: Scene) -> None:
    path = f"/api/v1/namespaces/{scene.namespace}/configmaps/held"
    scene.admin.ask("PATCH", path, {"metadata": {"finalizers": None}})


def quota(resource: str, most: int) -> Step:
    """A real quota, once it is enforced."""

    def step(scene: Scene) -> None:
        path = f"/api/v1/namespaces/{scene.namespace}/resourcequotas"
        hard = {resource: str(most)}
        if scene.admin.is_there(f"{path}/quota"):
            scene.admin.ask("PATCH", f"{path}/quota", {"spec": {"hard": hard}})
        else:
            scene.admin.ask("POST", path, {"metadata": {"name": "quota"}, "spec": {"hard": hard}})

        def holds() -> bool:
            status = scene.admin.ask("GET", f"{path}/quota").get("status", {})
            return status.get("hard") == hard and resource in status.get("used", {})

        scene.wait_until("the quota holds", holds)

    return step


def uncounted_quota(scene: Scene) -> None:
    """A real quota that no controller has calculated."""
    scene.cluster.stop("kube-controller-manager")
    path = f"/api/v1/namespaces/{scene.namespace}/resourcequotas"
    hard = {"count/pytorchjobs.kubeflow.org": "5"}
    scene.admin.ask("POST", path, {"metadata": {"name": "quota"}, "spec": {"hard": hard}})
    scene.admin.ask("PATCH", f"{path}/quota/status", {"status": {"hard": hard}})
    wait_until_refused(scene, "status unknown for quota")


def quota_counted(scene: Scene) -> None:
    scene.cluster.start("kube-controller-manager")


def may(*rules: tuple[str, str, str]) -> Step:
    """The step's account has exactly these permissions: API group, resource, verbs."""

    def step(scene: Scene) -> None:
        named = [
            {"apiGroups": [group], "resources": [resource], "verbs": verbs.split()}
            for group, resource, verbs in rules
        ]
        name = f"account-{scene.run}"
        grant(scene.admin, scene.namespace, name, named)
        scene.token = scene.cluster.token_for(scene.namespace, name)

    return step


def rights_taken(scene: Scene) -> None:
    """The account loses its permissions, which a new watch needs."""
    account = f"account-{scene.run}"
    scene.admin.delete(f"{RBAC}/namespaces/{scene.namespace}/rolebindings/{account}")
    verb = ("kubeflow.org", "pytorchjobs", "watch")
    scene.wait_until(
        "the rights are gone", lambda: not is_allowed(scene.admin, scene.namespace, account, *verb)
    )
    scene.proxy.cut(WATCHED)


def as_nobody(scene: Scene) -> None:
    scene.token = "no-such-token"


def as_administrator(scene: Scene) -> None:
    scene.token = scene.cluster.token


def refused_by_policy(scene: Scene) -> None:
    """A policy of the cluster refuses the job."""
    jobs = {"apiGroups": ["kubeflow.org"], "apiVersions": ["v1"], "resources": ["pytorchjobs"]}
    names = {"kubernetes.io/metadata.name": scene.namespace}
    admit(
        scene,
        "validatingadmissionpolicies",
        {
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [{**jobs, "operations": ["CREATE"]}]},
            "validations": [{"expression": "false", "message": "jobs cannot be without a budget"}],
        },
    )
    admit(
        scene,
        "validatingadmissionpolicybindings",
        {
            "policyName": scene.namespace,
            "validationActions": ["Deny"],
            "matchResources": {"namespaceSelector": {"matchLabels": names}},
        },
    )
    wait_until_refused(scene, "without a budget")


def refused_by_broken_webhook(scene: Scene) -> None:
    """A required webhook is not available: that of an operator that is restarting."""
    jobs = {"apiGroups": ["kubeflow.org"], "apiVersions": ["v1"], "resources": ["pytorchjobs"]}
    names = {"kubernetes.io/metadata.name": scene.namespace}
    hook = {
        "name": "validator.example.com",
        "rules": [{**jobs, "operations": ["CREATE"]}],
        "clientConfig": {"url": "https://127.0.0.1:1/validate"},
        "namespaceSelector": {"matchLabels": names},
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
    }
    body = {"metadata": {"name": scene.namespace}, "webhooks": [hook]}
    scene.admin.ask("POST", f"{ADMISSION}/validatingwebhookconfigurations", body)
    wait_until_refused(scene, "failed calling webhook")


def webhook_removed(scene: Scene) -> None:
    scene.admin.delete(f"{ADMISSION}/validatingwebhookconfigurations/{scene.namespace}")


def admit(scene: Scene, plural: str, spec: Object) -> None:
    body = {"metadata": {"name": scene.namespace}, "spec": spec}
    scene.admin.ask("POST", f"{ADMISSION}/{plural}", body)


def wait_until_refused(scene: Scene, message: str) -> None:
    """Waits until the API server knows what has to refuse the job."""

    def is_refused() -> bool:
        try:
            body = scene.request.to_object(PYTORCHJOB, 1)
            scene.admin.ask("POST", scene.jobs, body, dryRun="All")
        except client.ApiException as error:
            return message in error.body
        return False

    scene.wait_until("jobs are refused", is_refused)


def make_namespace(admin: Administrator, name: str) -> None:
    """A namespace with the account that launches jobs, and its permissions."""
    admin.ask("POST", "/api/v1/namespaces", {"metadata": {"name": name, "labels": RESTRICTED}})
    roles = [each for each in yaml.safe_load_all(ROLE.read_text()) if each["kind"] == "Role"]
    (rules,) = [each["rules"] for each in roles if each["metadata"]["name"] == ACCOUNT]
    grant(admin, name, ACCOUNT, rules)
    default = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    wait_until("pods may have an account", lambda: admin.is_there(default), within=WITHIN)


def grant(admin: Administrator, namespace: str, name: str, rules: list[Object]) -> None:
    """Creates an account with these permissions, and waits until it has them."""
    admin.ask(
        "POST", f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": name}}
    )
    roles = f"{RBAC}/namespaces/{namespace}/roles"
    admin.ask("POST", roles, {"metadata": {"name": name}, "rules": rules})
    binding = {
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
    }
    admin.ask("POST", f"{RBAC}/namespaces/{namespace}/rolebindings", binding)
    last = rules[-1]
    verb = (last["apiGroups"][0], last["resources"][0], last["verbs"][0])
    wait_until(
        "the account has its rights",
        lambda: is_allowed(admin, namespace, name, *verb),
        within=WITHIN,
    )


def is_allowed(
    admin: Administrator, namespace: str, account: str, group: str, resource: str, verb: str
) -> bool:
    asked = {"namespace": namespace, "group": group, "resource": resource, "verb": verb}
    user = f"system:serviceaccount:{namespace}:{account}"
    body = {"spec": {"user": user, "resourceAttributes": asked}}
    path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
    return bool(admin.ask("POST", path, body)["status"]["allowed"])


# The cases

EXPIRED = error_event(410, "Expired")
FAULTS = {
    "410 in the stream": EXPIRED,
    "410": answer(410, "Expired", "too old resource version"),
    "500": answer(500, "InternalError", "etcdserver: leader changed"),
    "a closed socket": drop,
    "silence": stall(after=0),
}
"""What happens to the next watches."""

PHASES: dict[str, tuple[tuple[Step, ...], tuple[Step, ...]]] = {
    "creating": ((), (takes_up, runs, tells("step 1"))),
    "waiting": ((takes_up,), (runs, tells("step 1"))),
    "running": ((is_running, tells("step 1")), (tells("step 2"),)),
    "ending": ((is_running, tells("step 1"), job("end", 0, 0)), ()),
}
"""What happens until a phase is reached, and what remains to happen until the end."""

WATCHES = [
    Case(
        f"the watches meet {fault} while {phase}",
        before=(loses_watches(FAULTS[fault]),) if phase == "creating" else (),
        steps=(
            *until,
            *(() if phase == "creating" else (loses_watches(FAULTS[fault]),)),
            *((both_met,) if phase == "creating" else ()),
            *after,
            *(() if phase == "creating" else (both_met,)),
            publishes,
            *(() if phase == "ending" else (job("end", 0, 0),)),
            job("succeed"),
        ),
        says=("has succeeded",),
    )
    for fault, (phase, (until, after)) in itertools.product(FAULTS, PHASES.items())
]

UNHEARD = (
    spoilt(answer(500, "InternalError", "odd"), "POST"),
    spoilt(lose_answer, "POST", times=1),
)
"""The job is created, and no response says so."""
STOPPED_IN = {
    "creating": (UNHEARD, (hears("is not responding as expected"),)),
    "waiting": ((), (takes_up,)),
    "running": ((), (is_running,)),
    "ending": ((), (is_running, job("end", 0, 0))),
}
STOPPING = {
    "creating": workflow(spec={"shutdown": "Terminate"}),
    "waiting": workflow(spec={"activeDeadlineSeconds": 0}),
    "running": workflow_deleted,
    "ending": workflow(status={"phase": "Failed"}),
}
"""How a workflow stops; each once."""

STOPS = [
    *(
        Case(
            f"SIGTERM while {phase}, and the workflow continues",
            before=before,
            steps=(*steps, stop),
            ends=Stopped,
            says=("continues; the next attempt of this step will watch it",),
        )
        for phase, (before, steps) in STOPPED_IN.items()
    ),
    *(
        Case(
            f"SIGTERM while {phase}, and the workflow is stopping",
            before=before,
            steps=(*steps, STOPPING[phase], stop),
            ends=Stopped,
            says=("Deleted PyTorchJob",),
            left=(),
        )
        for phase, (before, steps) in STOPPED_IN.items()
    ),
    Case(
        "SIGTERM before there is a job",
        before=(own_namespace, quota("count/pytorchjobs.kubeflow.org", 0)),
        steps=(hears("Waiting for the namespace's quota"), stop),
        ends=Stopped,
        says=("Stopped before the job was created",),
        left=(),
    ),
    Case(
        "SIGTERM while nobody knows whether there is a job",
        before=(spoilt(drop),),
        steps=(hears("is not responding as expected"), stop),
        ends=Stopped,
        says=("may have been created, but the API server is unavailable",),
        left=(),
    ),
    Case(
        "SIGTERM while nobody knows whether the workflow continues",
        steps=(
            is_running,
            spoilt(drop),
            loses_all,
            hears("is not responding as expected"),
            workflow(spec={"shutdown": "Terminate"}),
            stop,
        ),
        ends=Stopped,
        says=("continues; the next attempt of this step will watch it",),
    ),
    Case(
        "SIGTERM while the last lines of a failed job do not come",
        before=(waits_long_for_logs, spoilt(say_nothing, path=LOGS)),
        steps=(is_running, met, job("end", 0, 1), job("fail"), is_judged, stop),
        ends=JobFailed,
        says=("exited with code 1",),
    ),
]

ENDS = [
    Case(
        "success",
        steps=(is_running, tells("step 1", "step 2"), succeeds),
        says=("Created PyTorchJob", "(kubeflow.org/v1).", "1 pod is running.", "has succeeded"),
    ),
    Case(
        "success of two pods",
        before=(asks_for(pods=2),),
        steps=(
            takes_up,
            job("run", 0),
            hears("1 of 2 pods running"),
            runs,
            tells("step 1"),
            succeeds,
        ),
        says=("2 pods are running.", "has succeeded"),
    ),
    Case(
        "a failure comes with its exit code, its events and advice",
        steps=(
            is_running,
            tells("Error: /data is no data set."),
            job("warn", "PyTorchJobFailed", "the job is failing"),
            job("end", 0, 2),
            job("fail"),
        ),
        ends=JobFailed,
        says=("-worker-0 exited with code 2.", "Event: src-dpo-", "the job is failing", "fix"),
    ),
    Case(
        "of a pod whose log was not followed the last lines are shown",
        before=(asks_for(pods=2),),
        steps=(
            is_running,
            tells("step 1"),
            lambda scene: scene.logs.say(scene.job.pod(1), "ValueError: odd"),
            job("end", 1, 1, "", "2026-03-01T12:00:00Z"),
            job("end", 0, 1, "", "2026-03-01T12:00:01Z"),
            job("fail"),
        ),
        ends=JobFailed,
        says=("-worker-1 exited with code 1.", "Last lines of", "  ValueError: odd"),
    ),
    Case(
        "success is reported and nothing is published",
        steps=(is_running, job("end", 0, 0), job("succeed")),
        ends=JobFailed,
        says=("reported as succeeded, but has published nothing", "Deleted PyTorchJob"),
        left=(),
    ),
    Case(
        "the job fails, but has published before",
        steps=(is_running, publishes, job("end", 0, 1), job("fail")),
        says=("has published its result, so this is not an error: Pod", "exited with code 1"),
    ),
    Case(
        "a pod out of memory is final, though the operator recreates it",
        steps=(is_running, job("end", 0, 137, "OOMKilled"), job("remove_pod", 0)),
        ends=JobFailed,
        says=("-worker-0 ran out of memory", "training_memory", "Deleted PyTorchJob"),
        left=(),
    ),
    Case(
        "the job is deleted under us",
        steps=(is_running, job("remove")),
        ends=JobFailed,
        says=("was deleted before it published anything",),
        left=(),
    ),
    Case(
        "a finished job is removed before we look",
        steps=(
            is_running,
            tells("step 1"),
            # The watch resumes so late that only the list is left.
            spoilt(EXPIRED, "GET", "/pytorchjobs$", 1, watch="true"),
            spoilt(drop, "GET", WATCHED, watch="true"),
            loses_all,
            succeeds,
            job("remove"),
            mended,
        ),
        says=("is gone, but its output has been published",),
        left=(),
    ),
]

TIMES = [
    Case(
        "the wait in the queue is too long",
        steps=(
            job("take_up"),
            job("suspend"),
            hears("is waiting in its queue"),
            limited(waiting=1),
        ),
        ends=JobFailed,
        says=("waited for more than 1 s. The job is waiting in its queue.", "waiting_hours"),
        left=(),
    ),
    Case(
        "the run is too long",
        steps=(is_running, limited(running=1)),
        ends=JobFailed,
        says=("ran for more than 1 s.", "timeout_hours"),
        left=(),
    ),
    Case(
        "the run is too long, but has published",
        steps=(is_running, publishes, limited(running=1)),
        says=(
            "has published its result, so this is not an error: The job ran for more than 1 s.",
            "Deleted PyTorchJob",
        ),
        left=(),
    ),
    Case(
        "the run seems too long while nobody can confirm it",
        steps=(
            is_running,
            spoilt(answer(503, "ServiceUnavailable", "away"), "GET", "/pytorchjobs/"),
            limited(running=1),
            met,
            limited(running=1000),
            mended,
            succeeds,
        ),
        says=("has succeeded.",),
    ),
    Case(
        "a pod is never scheduled",
        steps=(
            takes_up,
            job("find_no_node", 0, "0/3 nodes: 3 Insufficient nvidia.com/gpu."),
            hears("cannot be scheduled"),
            limited(waiting=1),
        ),
        ends=JobFailed,
        says=(
            "-worker-0 cannot be scheduled: 0/3 nodes",
            "waited for more than 1 s",
            "Free some resources",
        ),
        left=(),
    ),
    Case(
        "nobody takes the job up",
        before=(limited(unclaimed=0.5),),
        ends=JobFailed,
        says=("No controller has picked up the job", "the Training Operator"),
        left=(),
    ),
    Case(
        "a pod is preempted, and the job continues",
        steps=(
            is_running,
            tells("step 1"),
            job("lose", 0),
            hears("lost so far: 1"),
            job("run", 0),
            tells("step 2"),
            succeeds,
        ),
        says=("1 pod is running (pods lost so far: 1).", "has succeeded"),
    ),
    Case(
        "pods are preempted too often",
        before=(limited(restarts=1),),
        steps=(
            is_running,
            job("lose", 0),
            hears("lost so far: 1"),
            job("run", 0),
            job("lose", 0),
        ),
        ends=JobFailed,
        says=("Pods were lost 2 times; the limit is 1.", "Deleted PyTorchJob"),
        left=(),
    ),
]

NEVER_STARTS = [
    Case(
        "the image is missing",
        steps=(takes_up, job("wait", 0, "ErrImagePull", "registry/x:1: not found")),
        ends=JobFailed,
        says=("cannot start: ErrImagePull: registry/x:1: not found", "image_pull_secrets"),
        left=(),
    ),
    Case(
        "the registry does not answer for long",
        steps=(takes_up, job("wait", 0, "ImagePullBackOff", "dial tcp: i/o timeout")),
        ends=JobFailed,
        says=("cannot start: ImagePullBackOff: dial tcp: i/o timeout",),
        left=(),
    ),
    Case(
        "CreateContainerConfigError",
        steps=(takes_up, job("wait", 0, "CreateContainerConfigError", 'secret "s3" not found')),
        ends=JobFailed,
        says=('CreateContainerConfigError: secret "s3" not found', "Secret or ConfigMap"),
        left=(),
    ),
    Case(
        "a ConfigMap is missing",
        steps=(
            takes_up,
            job("wait", 0, "ContainerCreating"),
            job("warn_of_pod", 0, "FailedMount", 'volume "ca": configmap "trusted" not found'),
        ),
        ends=JobFailed,
        says=('FailedMount: volume "ca": configmap "trusted" not found', "profile"),
        left=(),
    ),
    Case(
        "Pod Security refuses the pods",
        steps=(job("take_up"), job("make_pods", True)),
        ends=JobFailed,
        says=("violates PodSecurity", "init-pytorch", "pod-security.kubernetes.io/enforce"),
        left=(),
    ),
    Case(
        "the account of the pods is missing",
        before=(asks_for(service_account="nobody"),),
        steps=(job("take_up"), job("make_pods")),
        ends=JobFailed,
        says=("The job's pods are refused", 'serviceaccount "nobody" not found'),
        left=(),
    ),
    Case(
        "the pods wait for the namespace's quota",
        before=(own_namespace, quota("pods", 0)),
        steps=(
            job("take_up"),
            job("make_pods"),
            hears("exceeded quota: quota, requested: pods=1"),
            quota("pods", 1),
            is_running,
            succeeds,
        ),
        says=("has succeeded",),
    ),
]

NAMES = [
    Case(
        "a job of the same hash is adopted",
        before=(made_before(),),
        steps=(is_running, tells("step 1"), succeeds),
        says=("already exists; this step adopts it", "has succeeded"),
    ),
    Case(
        "a job of the same hash that has succeeded is adopted",
        before=(made_before(), publishes, job("succeed")),
        says=("already exists", "has succeeded"),
    ),
    Case(
        "a job of another hash has the name",
        before=(made_before(image="another"),),
        ends=UserError,
        says=("already exists with a different spec", "round_number"),
    ),
    Case(
        "a job of the same hash runs another image",
        before=(made_before(), job_changed(image="another")),
        ends=UserError,
        says=("already exists with a different spec (spec", ".containers[0].image)"),
    ),
    Case(
        "a job that a queue held back and placed is adopted",
        before=(made_before(), job_placed),
        steps=(is_running, succeeds),
        says=("already exists; this step adopts it", "has succeeded"),
    ),
    Case(
        "a pod that is not the job's has its labels",
        before=(made_before(), stranger),
        steps=(hears("The job has no pods yet"), is_running, succeeds),
        says=("0 of 1 pod running", "has succeeded"),
    ),
    Case(
        "a job of the same hash has failed, and the next attempt is made",
        before=(made_before(), job("fail")),
        steps=(attempt(2), is_running, succeeds),
        says=("-r1-a2 (kubeflow.org/v1).", "-r1-a2 has succeeded"),
        left=(1, 2),
    ),
    Case(
        "a job of that name is being deleted",
        before=(made_before(), job_held, job("remove")),
        steps=(
            hears("is being deleted; waiting until it is gone"),
            job_let_go,
            is_running,
            succeeds,
        ),
        says=("Created PyTorchJob", "has succeeded"),
    ),
    Case(
        "a job of that name does not go",
        before=(limited(waiting=0.5), made_before(), job_held, job("remove")),
        steps=(ended, job_let_go),
        ends=UserError,
        says=("could not be created in time", "kubectl describe"),
        left=(),
    ),
]

REFUSED = [
    Case(
        "the namespace is being deleted",
        before=(own_namespace, namespace_held, namespace_deleted),
        steps=(ended, namespace_let_go),
        ends=UserError,
        says=("is being deleted", "another namespace"),
        left=(),
    ),
    Case(
        "the namespace is deleted while the job runs",
        before=(own_namespace,),
        steps=(is_running, namespace_held, namespace_deleted, ended, namespace_let_go),
        ends=JobFailed,
        says=("was deleted before it published anything",),
        left=(),
    ),
    Case(
        "the quota of jobs is exceeded for too long",
        before=(limited(waiting=0.5), own_namespace, quota("count/pytorchjobs.kubeflow.org", 0)),
        ends=UserError,
        says=("did not fit into the namespace's quota in time", "exceeded quota: quota"),
        left=(),
    ),
    Case(
        "the quota of jobs is exceeded for a while",
        before=(own_namespace, quota("count/pytorchjobs.kubeflow.org", 0)),
        steps=(
            hears("Waiting for the namespace's quota"),
            quota("count/pytorchjobs.kubeflow.org", 1),
            is_running,
            succeeds,
        ),
        says=("has succeeded",),
    ),
    Case(
        "the quota of jobs has not been counted yet",
        before=(own_namespace, uncounted_quota),
        steps=(hears("status unknown for quota"), quota_counted, is_running, succeeds),
        says=("has succeeded",),
    ),
    Case(
        "the account may create no jobs",
        before=(may(("", "pods", "get list watch")),),
        ends=UserError,
        says=('cannot create resource "pytorchjobs"', "Bind the Role srccore-launcher"),
        left=(),
    ),
    Case(
        "the account may not list pods",
        before=(may(("kubeflow.org", "pytorchjobs", "create get list watch delete")),),
        ends=UserError,
        says=(
            'cannot list resource "pods"',
            "Bind the Role srccore-launcher",
            "Deleted PyTorchJob",
        ),
        left=(),
    ),
    Case(
        "the account may not read logs, and the job continues",
        before=(
            may(
                ("", "pods", "get list watch"),
                ("kubeflow.org", "pytorchjobs", "create get list watch delete"),
            ),
            spoilt(forward, path=LOGS),
        ),
        steps=(is_running, hears('cannot get resource "pods/log"'), succeeds),
        says=("has succeeded",),
    ),
    Case(
        "the rights are taken away while the job runs",
        before=(
            may(
                ("", "pods", "get list watch"),
                ("kubeflow.org", "pytorchjobs", "create get list watch delete"),
            ),
            outage(1),
        ),
        steps=(is_running, rights_taken),
        ends=JobFailed,
        says=(
            "has been unavailable for 1 s",
            "may continue; the next attempt of this step will watch it",
        ),
    ),
    Case(
        "the account is unknown",
        before=(as_nobody,),
        ends=UserError,
        says=("rejected the credentials of this step: Unauthorized", "token"),
        left=(),
    ),
    Case(
        "the kind is not installed",
        before=(as_trainjob, as_administrator),
        ends=UserError,
        says=(
            "has no TrainJob API (trainer.kubeflow.org/v1alpha1)",
            "Install Kubeflow Trainer 2.1",
        ),
        left=(),
    ),
    Case(
        "a policy refuses the job",
        before=(own_namespace, refused_by_policy),
        ends=UserError,
        says=("rejected the PyTorchJob", "jobs cannot be without a budget", "profile"),
        left=(),
    ),
    Case(
        "a webhook that is away for a while",
        before=(own_namespace, refused_by_broken_webhook),
        steps=(hears("failed calling webhook"), webhook_removed, is_running, succeeds),
        says=("has succeeded",),
    ),
]

AWAY = [
    Case(
        "the request for the job is refused for a while",
        before=(spoilt(answer(503, "ServiceUnavailable", "not yet"), "POST", times=2),),
        steps=(hears("not yet"), is_running, succeeds),
        says=("Created PyTorchJob", "has succeeded"),
    ),
    Case(
        "the answer to the request for the job is lost",
        before=(spoilt(lose_answer, "POST", times=1),),
        steps=(is_running, succeeds),
        says=("already exists; this step adopts it", "has succeeded"),
    ),
    Case(
        "the stream of the log is lost",
        steps=(
            is_running,
            tells("step 1", "step 2"),
            loses_log,
            tells("step 3"),
            spoilt(answer(502, "", "dial tcp: connection refused"), path=LOGS, times=1),
            loses_log,
            tells("step 4"),
            succeeds,
        ),
        says=("has succeeded",),
    ),
    Case(
        "the API server is away for longer than it may be",
        before=(outage(1),),
        steps=(is_running, spoilt(drop), loses_all, ended, mended),
        ends=JobFailed,
        says=(
            "has been unavailable for 1 s",
            "may continue; the next attempt of this step will watch it",
        ),
    ),
    Case(
        "the API server is away before there is a job",
        before=(outage(1), spoilt(drop)),
        steps=(ended, mended),
        ends=JobFailed,
        says=("The API server did not respond",),
        left=(),
    ),
    Case(
        "the API server is restarted while the job is created",
        before=(limited(refused=60), api_server_stops),
        steps=(
            hears("is not responding as expected"),
            api_server_restarts,
            is_running,
            tells("step 1"),
            succeeds,
        ),
        says=("has succeeded",),
    ),
    Case(
        "the API server is restarted while the job runs",
        before=(limited(refused=60),),
        steps=(is_running, tells("step 1"), api_server_restarts, tells("step 2"), succeeds),
        says=("has succeeded",),
    ),
]

CASES = [*ENDS, *TIMES, *NEVER_STARTS, *NAMES, *REFUSED, *AWAY, *WATCHES, *STOPS]


@pytest.fixture(scope="module")
def proxy(api_cluster: Cluster) -> Iterator[Proxy]:
    with Proxy(api_cluster.server, api_cluster.ca) as it:
        yield it


@pytest.fixture(scope="module")
def namespace(api_cluster: Cluster) -> str:
    make_namespace(Administrator(api_cluster), "launch")
    return "launch"


@pytest.fixture
def scene(
    api_cluster: Cluster, proxy: Proxy, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scene]:
    for name in ("TICK_SECONDS", "WARNINGS_SECONDS", "QUOTA_SECONDS", "ASK_SECONDS"):
        monkeypatch.setattr(launch_module, name, 0.1)
    proxy.reset()
    it = Scene(api_cluster, proxy, namespace, monkeypatch)
    yield it
    it.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_launch(case: Case, scene: Scene) -> None:
    for step in case.before:
        step(scene)
    scene.begin()
    for step in case.steps:
        step(scene)
    scene.join()
    said = "\n".join([*scene.lines, str(scene.error or "")])
    assert type(scene.error) is (case.ends or type(None)), said
    for text in case.says:
        assert text in said
    assert [scene.lines.count(line) for line in scene.told] == [1] * len(scene.told), said
    assert scene.left() == case.left


def test_no_two_cases_are_called_the_same() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 25


@pytest.mark.parametrize("namespace_of_context", ["", "theirs"])
def test_the_cluster_is_that_of_the_kubeconfig(
    namespace_of_context: str, api_cluster: Cluster, tmp_path: Path
) -> None:
    known = yaml.safe_load(api_cluster.kubeconfig.read_text())
    if namespace_of_context:
        known["contexts"][0]["context"]["namespace"] = namespace_of_context
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(known))
    done = connected(path)
    assert done.stdout.split() == [namespace_of_context or "default", "kube-system"], done.stderr


def test_no_cluster_at_all_is_told_with_what_to_do(tmp_path: Path) -> None:
    done = connected(tmp_path / "none")
    assert "Found no Kubernetes cluster" in done.stderr
    assert "set KUBECONFIG to a kubeconfig" in done.stderr


def connected(kubeconfig: Path) -> subprocess.CompletedProcess[str]:
    """What a process with a kubeconfig finds."""
    words = """
from srccore.cluster.api import connect
api = connect()
print(api.namespace, api.get("/api/v1/namespaces/kube-system")["metadata"]["name"])
"""
    environment = {
        name: value for name, value in os.environ.items() if "_proxy" not in name.lower()
    }
    return subprocess.run(
        [sys.executable, "-c", words],
        env={**environment, "KUBECONFIG": str(kubeconfig)},
        check=False,
        capture_output=True,
        text=True,
    )


STEP = """
import sys
from kubernetes import client
from cluster.job_controller import configuration
from srccore.cluster.api import Api
from srccore.cluster.launch import Launch, Stopped, signals
from srccore.cluster.observe import Limits
from srccore.cluster.request import PYTORCHJOB, TrainingJobRequest

url, token, request = sys.argv[1:]
request = TrainingJobRequest.model_validate_json(request)
api = Api(client.ApiClient(configuration(url, token)), request.namespace)
launch = Launch(api, PYTORCHJOB, request, Limits.of(request.settings), lambda: False)
try:
    with signals(launch.stop):
        launch.run()
except Stopped:
    raise SystemExit(143)
"""


@pytest.mark.parametrize("continues", [True, False], ids=["continues", "is stopping"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda each: each.name)
def test_a_process_that_is_told_to_end_does_so_in_order(
    number: signal.Signals, continues: bool, scene: Scene, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    words = [sys.executable, "-c", STEP, scene.proxy.url, scene.token]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with log.open("wb") as out:
        step = subprocess.Popen(
            [*words, scene.request.model_dump_json()],
            env={**os.environ, "PYTHONPATH": path},
            stdout=out,
            stderr=out,
        )
    try:
        scene.job.take_up()
        scene.job.make_pods()
        scene.job.run(0)
        scene.wait_until("the pod runs", lambda: "1 pod is running" in log.read_text())
        if not continues:
            workflow(spec={"shutdown": "Stop"})(scene)
        step.send_signal(number)
        assert step.wait(WITHIN) == 143
    finally:
        step.kill()
        step.wait()
    assert ("continues; the next attempt" in log.read_text()) is continues
    assert scene.left() == ((1,) if continues else ())
