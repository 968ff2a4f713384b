"""manifests/ on a real API server: what it accepts, who may do what, which pods it admits.

Network policies are accepted and select the pods that `tests/unit/test_manifests.py` says; nothing
in these tests enforces them. Kueue's kinds are not installed here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import operators
from cluster.clusters import Cluster, KubectlError
from kustomize import (
    ADMIN,
    MANIFESTS,
    OVERLAYS,
    Manifest,
    blocks,
    copied,
    kubectl,
    of_kind,
    only,
    render,
)

from srccore.cluster.request import (
    PYTORCHJOB,
    CaBundle,
    JobSettings,
    SecretKeys,
    TrainingJobRequest,
)
from srccore.config import load_config
from srccore.pipelines.profile import load_profile

UNKNOWN = {"ClusterQueue", "LocalQueue", "ResourceFlavor"}
"""Kinds of Kueue."""
SELF_REVIEWS = {"selfsubjectaccessreviews", "selfsubjectreviews", "selfsubjectrulesreviews"}
DRY_RUN = ("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-")
TRAINER_COMPONENT = "components: [../../components/trainjob, ../../components/cache]\n"
PAGES = ("admin", *(name for name in OVERLAYS if name != "overlays/kueue"), ".")
NOT_HERE = re.compile(r"^(aws|gcloud) |github\.com|kueue|localqueue")
"""Commands for a cloud, or for something that no server of the tests has."""


def apply(cluster: Cluster, objects: list[Manifest], *words: str) -> str:
    words = words or ("apply", "--server-side", "--validate=strict", "-f", "-")
    return cluster.kubectl(*words, stdin=yaml.safe_dump_all(objects))


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with its own namespace: other tests use the cluster, too."""
    name = f"srccore-{uuid.uuid4().hex[:8]}"
    return copied(tmp_path_factory.mktemp("site"), namespace=name).parents[1]


@pytest.fixture(scope="module")
def namespace(api_cluster: Cluster, manifests: Path) -> Iterator[str]:
    """The administrators' namespace, with the overlay for one node in it."""
    made = only(render(manifests / "admin"), "Namespace")
    apply(api_cluster, [made])
    apply(api_cluster, render(manifests / "overlays/single-node"))
    name: str = made["metadata"]["name"]
    # The quota refuses every pod until the controllers have calculated it.
    counted = ("resourcequota/srccore", "--for=jsonpath={.status.used.pods}", "--timeout=60s")
    api_cluster.kubectl("wait", *counted, f"--namespace={name}")
    yield name
    api_cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.mark.parametrize("folder", [*ADMIN, *OVERLAYS])
def test_the_server_accepts_every_object_of_a_kind_that_it_knows(
    api_cluster: Cluster, manifests: Path, namespace: str, folder: str
) -> None:
    objects = render(manifests / folder)
    known = [each for each in objects if each["kind"] not in UNKNOWN]
    accepted = apply(api_cluster, known, *DRY_RUN).splitlines() if known else []
    assert len(accepted) == len(known)
    assert known or folder == "admin/kueue"


def test_a_field_that_the_server_does_not_know_would_be_refused(
    api_cluster: Cluster, manifests: Path, namespace: str
) -> None:
    policy = of_kind(render(manifests / "overlays/single-node"), "NetworkPolicy")[0]
    policy["spec"]["policyType"] = ["Egress"]
    with pytest.raises(KubectlError, match="policyType"):
        apply(api_cluster, [policy], *DRY_RUN)


# Rights


def rights(cluster: Cluster, namespace: str, account: str) -> set[tuple[str, str, str]]:
    """All that an account may do in the namespace: group, resource, verb."""
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }
    user = f"--as=system:serviceaccount:{namespace}:{account}"
    # To validate, kubectl would request the kinds of the cluster as that account.
    words = ("create", "--validate=false", "-f", "-", "--output=json", user)
    found = json.loads(cluster.kubectl(*words, stdin=json.dumps(review)))["status"]
    assert not found["incomplete"]
    return {
        (group, resource, verb)
        for rule in found["resourceRules"]
        for group in rule.get("apiGroups", [])
        for resource in rule.get("resources", [])
        for verb in rule["verbs"]
        if resource not in SELF_REVIEWS
    }


@pytest.mark.parametrize("account", ["srccore-launcher", "pipeline-runner"])
def test_who_launches_jobs_may_do_that_and_nothing_else(
    api_cluster: Cluster, namespace: str, account: str
) -> None:
    assert rights(api_cluster, namespace, account) == {
        *(("kubeflow.org", "pytorchjobs", verb) for verb in ("create", "get", "list", "watch")),
        ("kubeflow.org", "pytorchjobs", "delete"),
        *(("", "pods", verb) for verb in ("get", "list", "watch")),
        ("", "pods/log", "get"),
        ("", "events", "list"),
        ("argoproj.io", "workflows", "get"),
    }


@pytest.mark.parametrize("account", ["srccore-training", "default", "default-editor"])
def test_nobody_else_may_do_anything(api_cluster: Cluster, namespace: str, account: str) -> None:
    assert rights(api_cluster, namespace, account) == set()


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("create pytorchjobs.kubeflow.org", "yes"),
        ("get pods --subresource=log", "yes"),
        ("get workflows.argoproj.io", "yes"),
        ("create pods", "no"),
        ("create pods --subresource=exec", "no"),
        ("get secrets", "no"),
        ("patch pytorchjobs.kubeflow.org", "no"),
        ("create serviceaccounts --subresource=token", "no"),
        ("list pods --all-namespaces", "no"),
        ("create pytorchjobs.kubeflow.org --namespace=default", "no"),
        ("get nodes", "no"),
    ],
)
def test_the_launcher_is_told_so(
    api_cluster: Cluster, namespace: str, question: str, answer: str
) -> None:
    account = f"--as=system:serviceaccount:{namespace}:srccore-launcher"
    words = question.split()
    if "namespace" not in question:
        words.append(f"--namespace={namespace}")
    # kubectl exits with 1 if the answer is no.
    assert api_cluster.kubectl_succeeds("auth", "can-i", *words, account) == (answer == "yes")


# Pod Security


def pod(name: str, template: Manifest) -> str:
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **template.get("metadata", {})},
            "spec": template["spec"],
        }
    )


def training_pod(namespace: str, **settings: Any) -> str:
    request = TrainingJobRequest(
        stage="train-dpo",
        run="0123abcd",
        namespace=namespace,
        task="{}",
        settings=JobSettings(
            image="localhost/srccore/train-dpo:1", service_account="srccore-training", **settings
        ),
    )
    job = request.to_object(PYTORCHJOB, 1)
    return pod("training", job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "gpus": 8,
            "shared_memory": "8Gi",
            "cache_claim": "model-cache",
            "ca_bundle": CaBundle(config_map="trusted-certificates"),
            "secrets": (SecretKeys(name="s3-credentials", keys={"access-key": "KEY"}),),
            "image_pull_secrets": ("registry-credentials",),
        },
    ],
    ids=["plain", "with everything"],
)
def test_a_training_pod_is_let_in_and_gets_no_token(
    api_cluster: Cluster, namespace: str, settings: dict[str, Any]
) -> None:
    # The namespace warns about violations of the newest standard: there are none, either.
    strict = ("create", "--dry-run=server", "--validate=strict", "--warnings-as-errors")
    words = (*strict, f"--namespace={namespace}", "--output=json", "-f", "-")
    made = json.loads(api_cluster.kubectl(*words, stdin=training_pod(namespace, **settings)))
    assert made["spec"]["serviceAccountName"] == "srccore-training"
    assert not [each for each in made["spec"]["volumes"] if "projected" in each]


@pytest.mark.parametrize(
    ("spec", "violated"),
    [
        ({}, "runAsNonRoot"),
        ({"securityContext": {"runAsUser": 0}}, "runAsUser=0"),
        ({"hostNetwork": True}, "hostNetwork"),
    ],
    ids=["says nothing", "root", "the host's network"],
)
def test_a_pod_that_is_not_restricted_is_refused(
    api_cluster: Cluster, namespace: str, spec: Manifest, violated: str
) -> None:
    containers = [{"name": "main", "image": "localhost/none"}]
    words = ("create", "--dry-run=server", f"--namespace={namespace}", "-f", "-")
    with pytest.raises(KubectlError, match=f'violates PodSecurity "restricted:v.*{violated}'):
        api_cluster.kubectl(
            *words, stdin=pod("refused", {"spec": {"containers": containers, **spec}})
        )


def test_the_quota_counts_gpus(api_cluster: Cluster, namespace: str) -> None:
    words = ("create", "--dry-run=server", f"--namespace={namespace}", "-f", "-")
    with pytest.raises(KubectlError, match=r"exceeded quota: srccore, .*nvidia\.com/gpu"):
        api_cluster.kubectl(*words, stdin=training_pod(namespace, gpus=9))


# A separate cluster: kinds are added to it, and the namespace has the name of the pages


@pytest.fixture(scope="module")
def own_cluster(api_cluster: Cluster) -> Iterator[Cluster]:
    """Needs what ``api_cluster`` needs."""
    with Cluster("api") as it:
        kinds = operators.TRAINER.source / "manifests/base/crds"
        it.kubectl("apply", "--server-side", "-k", str(kinds))
        it.kubectl("wait", "--for=condition=Established", "crds", "--all", "--timeout=60s")
        yield it


def test_the_server_accepts_the_components(own_cluster: Cluster, tmp_path: Path) -> None:
    objects = render(copied(tmp_path, text=TRAINER_COMPONENT))
    apply(own_cluster, render(MANIFESTS / "admin"))
    assert len(apply(own_cluster, objects, *DRY_RUN).splitlines()) == len(objects)
    own_cluster.kubectl("delete", "namespace", "srccore")


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(own_cluster: Cluster, tmp_path: Path, page: str) -> None:
    shutil.copytree(MANIFESTS, tmp_path / "manifests")
    (tmp_path / "auth.json").write_text('{"auths": {}}')
    text = "".join(blocks(MANIFESTS / page / "README.md", "console"))
    lines = [line for line in text.splitlines() if not NOT_HERE.search(line)]
    named = [at for at, line in enumerate(lines) if "serviceaccount pipeline-runner" in line]
    if named:
        # Kubeflow Pipelines creates this account.
        account = "kubectl create serviceaccount pipeline-runner --namespace srccore"
        lines.insert(named[0], account)
    environment = {
        **os.environ,
        "PATH": f"{Path(kubectl()).parent}:{os.environ['PATH']}",
        "KUBECONFIG": str(own_cluster.kubeconfig),
        "KUBECACHEDIR": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    if page == ".":
        # The folder's profile is what remains of the namespace.
        config = load_config("llava-1.5-7b", [])
        given = load_profile(tmp_path / "cluster.yaml", config)
        assert given == load_profile(MANIFESTS / "overlays/eks/profile.yaml", config)
        assert not own_cluster.kubectl_succeeds("get", "namespace", "srccore")
    else:
        own_cluster.kubectl("delete", "namespace", "srccore")
