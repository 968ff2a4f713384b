"""What manifests/ renders: scopes, permissions, labels; profiles and pages match the objects.

``SRCCORE_WRITE_GOLDENS=1`` writes the files that rendered objects are compared with.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from kustomize import (
    ADMIN,
    FOLDERS,
    MANIFESTS,
    OVERLAYS,
    Manifest,
    blocks,
    copied,
    of_kind,
    only,
    render,
    rendered,
)

from srccore.cluster.request import (
    PYTORCHJOB,
    TRAINING_RUNTIME,
    TRAINJOB,
    JobSettings,
    TrainingJobRequest,
)
from srccore.config import load_config
from srccore.pipelines.profile import Profile, load_profile

GOLDENS = Path(__file__).parent / "goldens" / "manifests"
STEPS = "srccore-pipeline-steps"
PAGES = sorted(MANIFESTS.rglob("README.md"))
PART_OF = {"app.kubernetes.io/part-of": "srccore"}
NAMESPACED = {
    "ConfigMap",
    "LocalQueue",
    "NetworkPolicy",
    "PersistentVolumeClaim",
    "ResourceQuota",
    "Role",
    "RoleBinding",
    "ServiceAccount",
    "TrainingRuntime",
}
CLUSTER_SCOPED = {"ClusterQueue", "Namespace", "PriorityClass", "ResourceFlavor"}
COMPONENTS = """
components:
  - ../../components/trainjob
  - ../../components/cache
"""


def request(**settings: Any) -> TrainingJobRequest:
    return TrainingJobRequest(
        stage="train-dpo",
        run="0123abcd",
        namespace="srccore",
        task="{}",
        settings=JobSettings(image="localhost/srccore/train-dpo:1", **settings),
    )


def worker(job: Manifest) -> Manifest:
    """The pod template of a PyTorchJob."""
    template: Manifest = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    return template


TRAINING_POD = worker(request().to_object(PYTORCHJOB, 1))["metadata"]["labels"]
STEP_POD = {**PART_OF, "app.kubernetes.io/component": "train-dpo"}
"""As `srccore.pipelines.pods` labels it."""


# Scopes and names


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_object_is_labelled_and_named_once(folder: str) -> None:
    objects = rendered(folder)
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert names
    assert len(names) == len(set(names))
    for each in objects:
        assert PART_OF.items() <= each["metadata"]["labels"].items()


@pytest.mark.parametrize("folder", OVERLAYS)
def test_an_overlay_keeps_to_its_namespace(folder: str) -> None:
    for each in rendered(folder):
        assert each["kind"] in NAMESPACED
        assert each["metadata"]["namespace"] == "srccore"


@pytest.mark.parametrize("folder", ADMIN)
def test_what_is_cluster_scoped_is_for_administrators(folder: str) -> None:
    for each in rendered(folder):
        assert each["kind"] in CLUSTER_SCOPED
        assert "namespace" not in each["metadata"]


def test_one_line_moves_the_namespace_and_all_that_lives_in_it(tmp_path: Path) -> None:
    site = copied(tmp_path, namespace="team-a")
    objects = render(site)
    assert {each["metadata"]["namespace"] for each in objects} == {"team-a"}
    subjects = [each["subjects"] for each in of_kind(objects, "RoleBinding")]
    assert [each["namespace"] for (each,) in subjects] == ["team-a", "team-a"]
    assert only(render(tmp_path / "manifests/admin"), "Namespace")["metadata"]["name"] == "team-a"


@pytest.mark.parametrize("folder", OVERLAYS)
def test_the_account_of_steps_is_changed_as_the_page_says(folder: str, tmp_path: Path) -> None:
    (lines,) = (t for t in blocks(MANIFESTS / "README.md", "yaml") if "profile-namespace" in t)
    before, after = rendered(folder), render(copied(tmp_path, Path(folder).name, lines))
    (subject,) = only(after, "RoleBinding", STEPS)["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": "default-editor", "namespace": "srccore"}
    # Everything else stays the same: an overlay has its own patches.
    subject["name"] = "pipeline-runner"
    assert sorted(map(str, after)) == sorted(map(str, before))


# Rights


@pytest.mark.parametrize("folder", OVERLAYS)
def test_the_launcher_has_these_rights_and_no_others(folder: str) -> None:
    (role,) = of_kind(rendered(folder), "Role")
    found = {
        (group, resource): tuple(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert found == {
        ("kubeflow.org", "pytorchjobs"): ("create", "get", "list", "watch", "delete"),
        ("", "pods"): ("get", "list", "watch"),
        ("", "pods/log"): ("get",),
        ("", "events"): ("list",),
        ("argoproj.io", "workflows"): ("get",),
    }


def test_the_launcher_and_the_steps_of_a_pipeline_share_one_role() -> None:
    bindings = of_kind(rendered("base"), "RoleBinding")
    assert {each["roleRef"]["name"] for each in bindings} == {"srccore-launcher"}
    subjects = {subject["name"] for each in bindings for subject in each["subjects"]}
    assert subjects == {"srccore-launcher", "pipeline-runner"}


def test_training_pods_have_an_account_without_rights_and_without_a_token() -> None:
    account = only(rendered("base"), "ServiceAccount", "srccore-training")
    assert account["automountServiceAccountToken"] is False


def test_no_right_is_a_wildcard(tmp_path: Path) -> None:
    for role in of_kind(render(copied(tmp_path, text=COMPONENTS)), "Role"):
        assert "*" not in json.dumps(role)


def test_no_secret_has_a_value_and_git_ignores_the_one_that_gets_them() -> None:
    for folder in FOLDERS:
        assert not of_kind(rendered(folder), "Secret")
    secrets = list(yaml.safe_load_all((MANIFESTS / "secrets.example.yaml").read_text()))
    assert {each["kind"] for each in secrets} == {"Secret"}
    for each in secrets:
        assert "data" not in each
        assert set(each["stringData"].values()) == {""}
    assert "secrets.yaml" in (MANIFESTS / ".gitignore").read_text().splitlines()


def test_the_namespace_enforces_restricted() -> None:
    labels = only(rendered("admin"), "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert re.fullmatch(r"v1\.\d+", labels["pod-security.kubernetes.io/enforce-version"])


def test_priority_classes_evict_nobody_and_are_seen_by_the_autoscaler() -> None:
    for each in of_kind(rendered("admin"), "PriorityClass"):
        assert each["preemptionPolicy"] == "Never"
        assert each["value"] >= -10  # the cluster autoscaler adds no nodes for pods below that
        assert not each.get("globalDefault")


# Components


def test_components_are_added_as_the_page_says(tmp_path: Path) -> None:
    assert COMPONENTS.lstrip() in blocks(MANIFESTS / "README.md", "yaml")
    objects = render(copied(tmp_path, "kueue", COMPONENTS))
    assert {each["metadata"]["namespace"] for each in objects} == {"srccore"}
    assert only(objects, "Role")["rules"][-1] == {
        "apiGroups": ["trainer.kubeflow.org"],
        "resources": ["trainjobs"],
        "verbs": ["create", "get", "list", "watch", "delete"],
    }
    claim = only(objects, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["metadata"]["name"] in (MANIFESTS / "README.md").read_text()


def test_a_pod_of_a_trainjob_is_secured_like_one_of_a_pytorchjob(tmp_path: Path) -> None:
    runtime = only(render(copied(tmp_path, text=COMPONENTS)), "TrainingRuntime")
    assert runtime["metadata"]["name"] == TRAINING_RUNTIME
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    ours = job["template"]["spec"]["template"]["spec"]
    asked = request().to_object(TRAINJOB, 1)["spec"]["podTemplateOverrides"][0]
    assert asked["targetJobs"] == [{"name": job["name"]}]
    assert [each["name"] for each in asked["spec"]["containers"]] == [
        each["name"] for each in ours["containers"]
    ]
    theirs = worker(request().to_object(PYTORCHJOB, 1))["spec"]
    for field in (
        "automountServiceAccountToken",
        "securityContext",
        "terminationGracePeriodSeconds",
    ):
        assert ours[field] == theirs[field], field
    assert ours["containers"][0]["securityContext"] == theirs["containers"][0]["securityContext"]


# Network


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a label selector matches a pod."""
    found = [labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()]
    for each in selector.get("matchExpressions", []):
        assert each["operator"] in ("Exists", "DoesNotExist")
        found.append((each["key"] in labels) == (each["operator"] == "Exists"))
    return all(found)


@pytest.mark.parametrize(
    ("labels", "policies"),
    [
        (
            worker(request().to_object(PYTORCHJOB, 1))["metadata"]["labels"],
            {"default", "https", "training"},
        ),
        # As srccore.pipelines.pods labels the pod of a step.
        ({**PART_OF, "app.kubernetes.io/component": "train-dpo"}, {"default", "https", "steps"}),
        ({"app": "ml-pipeline"}, set()),
    ],
    ids=["a training pod", "a step", "somebody else's"],
)
def test_network_policies_mean_these_pods(labels: dict[str, str], policies: set[str]) -> None:
    found = {
        each["metadata"]["name"].removeprefix("srccore-")
        for each in of_kind(rendered("base"), "NetworkPolicy")
        if selects(each["spec"]["podSelector"], labels)
    }
    assert found == policies


def test_only_training_pods_are_connected_to_and_only_by_each_other() -> None:
    for each in of_kind(rendered("base"), "NetworkPolicy"):
        for rule in each["spec"].get("ingress", []):
            assert rule["from"] == [{"podSelector": each["spec"]["podSelector"]}]
            assert not selects(each["spec"]["podSelector"], PART_OF)


def test_nothing_but_names_leads_from_an_airgapped_pod_to_a_public_address() -> None:
    policies = of_kind(rendered("overlays/airgap"), "NetworkPolicy")
    rules = [rule for each in policies for rule in each["spec"].get("egress", [])]
    blocked = [
        peer["ipBlock"]["cidr"]
        for rule in rules
        for peer in rule.get("to", [])
        if "ipBlock" in peer
    ]
    assert len(blocked) == 8  # four networks, for two policies
    assert all(ipaddress.ip_network(each).is_private for each in blocked)
    (open_rule,) = (rule for rule in rules if "to" not in rule)
    assert {each["port"] for each in open_rule["ports"]} == {53}


# Profiles


@pytest.mark.parametrize("folder", OVERLAYS)
def test_a_profile_names_what_the_cluster_then_has(folder: str) -> None:
    config = load_config("tiny" if folder.endswith("single-node") else "llava-1.5-7b", [])
    profile = load_profile(MANIFESTS / folder / "profile.yaml", config)
    assert profile.launcher == "pytorchjob"
    job = profile.training_job
    only(rendered(folder), "ServiceAccount", job.service_account)
    queues = [each["metadata"]["name"] for each in of_kind(rendered(folder), "LocalQueue")]
    assert queues == ([job.queue] if job.queue else [])
    if job.priority_class:
        only(rendered("admin"), "PriorityClass", job.priority_class)
    template = list(yaml.safe_load_all((MANIFESTS / "secrets.example.yaml").read_text()))
    for secret in profile.secrets:
        assert set(secret.keys) == set(only(template, "Secret", secret.name)["stringData"])
    named_on_the_page(folder, profile)


def named_on_the_page(folder: str, profile: Profile) -> None:
    """A command on the overlay's page creates what a profile needs and no manifest creates."""
    page = (MANIFESTS / folder / "README.md").read_text()
    names = list(profile.image_pull_secrets)
    if profile.ca_bundle:
        names.append(profile.ca_bundle.config_map)
    for name in names:
        assert re.search(rf"kubectl create .*\b{name}\b", page), name
    if profile.secrets:
        assert "-f manifests/secrets.yaml" in page


@pytest.mark.parametrize("folder", OVERLAYS)
def test_the_namespace_holds_the_profile_that_stands_in_the_folder(folder: str) -> None:
    defaults = only(rendered(folder), "ConfigMap", "srccore-defaults")["data"]
    assert defaults["profile.yaml"] == (MANIFESTS / folder / "profile.yaml").read_text()
    assert defaults["artifact-root"].startswith("s3://")


def test_the_role_of_amazon_is_taken_by_the_accounts_that_name_it() -> None:
    folder = MANIFESTS / "overlays/eks"
    accounts = of_kind(rendered("overlays/eks"), "ServiceAccount")
    roles = {tuple(each["metadata"]["annotations"].items()) for each in accounts}
    ((_, role),) = roles.pop()
    assert not roles
    assert role in (folder / "README.md").read_text()
    (trust,) = json.loads((folder / "trust-policy.json").read_text())["Statement"]
    bindings = of_kind(rendered("overlays/eks"), "RoleBinding")
    names = {each["metadata"]["name"] for each in accounts}
    names |= {subject["name"] for each in bindings for subject in each["subjects"]}
    (allowed,) = (
        value for key, value in trust["Condition"]["StringEquals"].items() if key.endswith(":sub")
    )
    assert set(allowed) == {f"system:serviceaccount:srccore:{name}" for name in names}
    assert trust["Principal"]["Federated"].split(":")[4] == role.split(":")[4]
    json.loads((folder / "bucket-policy.json").read_text())


# Goldens: no server of the tests serves these kinds


@pytest.mark.parametrize("folder", ["admin/kueue", "overlays/kueue"])
def test_what_is_rendered_for_kueue_is_what_was_read_over(folder: str) -> None:
    path = GOLDENS / f"{folder.replace('/', '-')}.yaml"
    found = rendered(folder)
    if os.environ.get("SRCCORE_WRITE_GOLDENS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump_all(found, sort_keys=True), encoding="utf-8")
    assert found == list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


# Pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(MANIFESTS)))
def test_links_and_commands_of_a_page_lead_to_what_is_there(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    written = {"manifests/overlays/site", "manifests/secrets.yaml"}
    for path in set(re.findall(r"(?<!\.git/)\bmanifests/[\w./-]*\w", text)) - written:
        assert (MANIFESTS.parent / path).exists(), path


def test_every_overlay_has_its_page_and_is_in_the_table() -> None:
    text = (MANIFESTS / "README.md").read_text()
    for folder in OVERLAYS:
        assert (MANIFESTS / folder / "README.md").exists()
        assert f"[{folder}]({folder})" in text
