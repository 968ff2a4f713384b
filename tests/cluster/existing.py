"""An existing cluster, instead of our own cluster with a node.

SRCCORE_TEST_KUBECONFIG names its kubeconfig. It is a cluster of kind, minikube and the like, or
one that ``python -m tests.cluster up`` has started, which offers everything.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from .clusters import Cluster, Reachable

KUBECONFIG = "SRCCORE_TEST_KUBECONFIG"
REGISTRY = "SRCCORE_TEST_REGISTRY"


class ExistingCluster(Reachable):
    """An existing cluster. A test that needs something it does not offer is skipped."""

    @property
    def registry(self) -> str:
        named = os.environ.get(REGISTRY)
        if not named:
            pytest.skip(f"{REGISTRY} is not set to a registry of the cluster in {KUBECONFIG}")
        return named

    def __getattr__(self, name: str) -> Any:
        if name in dir(Cluster) and not name.startswith("_"):
            pytest.skip(f"the cluster that {KUBECONFIG} names has no {name}")
        raise AttributeError(name)


def existing() -> Cluster | ExistingCluster | None:
    """The cluster that the environment names, if it names one."""
    named = os.environ.get(KUBECONFIG)
    if not named:
        return None
    path = Path(named).resolve()
    if (path.parent / "cluster.json").exists():
        return Cluster.found(path.parent)
    return ExistingCluster(path)
