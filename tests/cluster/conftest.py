"""The clusters of the tests: one of each size for a whole test run, started on demand."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Generator, Iterator

import pytest
from cluster.clusters import Cluster
from cluster.existing import ExistingCluster, existing
from cluster.installation import EXACT, METHOD, Site
from cluster.pipeline_pods import Pods
from cluster.processes import MissingError
from container.podman import BUILT, Podman

collect_ignore = ["cache", "tools"]
"""A running node keeps all files of its images in there."""


@pytest.fixture(scope="session")
def api_cluster() -> Iterator[Cluster]:
    """An API server and controllers, without nodes."""
    with _cluster("api") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def node_cluster() -> Iterator[Cluster | ExistingCluster]:
    """A complete cluster with a node, or the one that SRCCORE_TEST_KUBECONFIG names."""
    if (found := existing()) is not None:
        yield found
        return
    with _cluster("node") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def site(node_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The shipped manifests and images on that cluster, with a bucket."""
    if os.geteuid() != 0 or shutil.which("podman") is None:
        pytest.skip("images are built as root with podman here (apt-get install podman)")
    folder = tmp_path_factory.mktemp("site")
    podman = Podman(folder)
    podman.build()
    digests = folder / "images.txt"
    pushed = ("--registry", node_cluster.registry, "--no-tls-verify", "-o", str(digests))
    names = (word for name in BUILT for word in ("--image", name))
    podman.srccore("images", "push", "--tool", "podman", *names, *pushed)
    site = Site(node_cluster, node_cluster.s3.with_new_bucket(), digests, podman)
    site.install()
    return site


@pytest.fixture(scope="session")
def pods(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Pods:
    """A shrunken `tiny`, run through its compiled pipeline in pods."""
    folder = tmp_path_factory.mktemp("end-to-end")
    package = site.compile(folder / "src.yaml", "--rounds", "1", "--shards", "2")
    pods = site.pods(package, site.arguments(package, *METHOD, EXACT))
    pods.run(folder / "kubeflow")
    return pods


@contextlib.contextmanager
def _cluster(size: str) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(Cluster(size))
        except MissingError as error:
            pytest.skip(str(error))
        yield cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports where the logs are and what has exited, for a test that failed on a cluster."""
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, Cluster):
                report.sections.append((name, value.condition()))
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the tests of the cluster itself first: if they fail, the others mean nothing."""
    items.sort(key=lambda item: item.path.name != "test_cluster.py")
