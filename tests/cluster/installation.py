"""An installation: the shipped manifests applied, images pushed, keys and a bucket at hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from cluster.clusters import Cluster
from cluster.pipeline_pods import Pods
from container.podman import Podman
from local.shrunken import SETTINGS
from s3_server import S3Server

from srccore.kubeflow.package import read_package

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
OVERLAY = MANIFESTS / "overlays" / "single-node"
NAMESPACE = "srccore"
ACCOUNT = "pipeline-runner"
"""The account that Kubeflow Pipelines runs steps as."""
METHOD = tuple(each for each in SETTINGS if not each.startswith("rounds="))
EXACT = "dpo.lora.dropout=0"
"""Dropout draws different numbers in two processes than in one."""


@dataclasses.dataclass
class Site:
    """What an administrator has set up.

    Args:
        cluster: With a node.
        store: A bucket for everything.
        digests: The list that ``srccore images push`` wrote.
    """

    cluster: Cluster
    store: S3Server
    digests: Path
    podman: Podman

    @property
    def artifact_root(self) -> str:
        return f"{self.store.uri}/src"

    def install(self) -> None:
        """Applies the manifests as their README says."""
        self._apply("-k", str(MANIFESTS / "admin"))
        self._apply("-f", "-", stdin=json.dumps(self._objects()))
        self._apply("-k", str(OVERLAY))
        # The quota admits nothing before it has been calculated.
        self.kubectl(
            "wait", "resourcequota/srccore", "--for=jsonpath={.status.used.pods}", "--timeout=60s"
        )

    def compile(self, package: Path, *words: str, secret: str = "s3-credentials") -> Path:
        """Compiles `tiny` with the overlay's profile; returns the package."""
        profile = yaml.safe_load((OVERLAY / "profile.yaml").read_text(encoding="utf-8"))
        profile["environment"]["AWS_ENDPOINT_URL"] = self.store.endpoint
        (keys,) = profile["secrets"]
        keys["name"] = secret
        file = package.with_name("profile.yaml")
        file.write_text(yaml.safe_dump(profile), encoding="utf-8")
        self.podman.srccore(
            *("compile", "--preset", "tiny", "--profile", str(file)),
            *("--registry", self.cluster.registry, "--digests", str(self.digests)),
            *("-o", str(package), *words),
        )
        return package

    def arguments(self, package: Path, *settings: str) -> dict[str, Any]:
        """The run-time parameters that `srccore submit` would send."""
        return read_package(package).arguments(self.artifact_root, settings, ())

    def pods(self, package: Path, arguments: dict[str, Any], **options: Any) -> Pods:
        """Runs a pipeline's tasks as the account that Kubeflow would run them as."""
        return Pods(
            kubeconfig=self.cluster.kubeconfig,
            namespace=NAMESPACE,
            service_account=ACCOUNT,
            package=package,
            arguments=arguments,
            store=self.store,
            **options,
        )

    def jobs(self) -> list[dict[str, Any]]:
        return self._list("pytorchjobs")

    def training_pods(self) -> list[dict[str, Any]]:
        return self._list("pods", "--selector=training.kubeflow.org/job-name")

    def kubectl(self, *words: str, stdin: str | None = None) -> str:
        """Runs kubectl in the namespace; returns what it prints."""
        return self.cluster.kubectl("--namespace", NAMESPACE, *words, stdin=stdin)

    def _list(self, *words: str) -> list[dict[str, Any]]:
        return list(json.loads(self.kubectl("get", *words, "--output=json"))["items"])

    def _apply(self, *words: str, stdin: str | None = None) -> None:
        self.cluster.kubectl("apply", "--server-side", *words, stdin=stdin)

    def _objects(self) -> dict[str, Any]:
        secrets = {"s3-credentials": self.store.secret, "wrong-keys": "not-the-secret"}
        account = {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": ACCOUNT, "namespace": NAMESPACE},
        }
        listed = [
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": name, "namespace": NAMESPACE},
                "stringData": {"access-key": self.store.key, "secret-key": secret},
            }
            for name, secret in secrets.items()
        ]
        return {"apiVersion": "v1", "kind": "List", "items": [account, *listed]}
