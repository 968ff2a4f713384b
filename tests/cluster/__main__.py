"""A test cluster for exploring: ``python -m tests.cluster up|down|status [--size api|node]``.

It stays up until it is taken down. Tests use it instead of their own cluster if
SRCCORE_TEST_KUBECONFIG is set to its kubeconfig.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does

from cluster.build import CACHE, BuildError
from cluster.clusters import NODE_FOLDER, SIZES, Cluster
from cluster.processes import ClusterError

FOLDERS = {"api": CACHE / "api", "node": NODE_FOLDER}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("what", choices=["up", "down", "status"])
    parser.add_argument("--size", choices=SIZES, default="node", help="api needs no root")
    asked = parser.parse_args()
    cluster = Cluster(asked.size, FOLDERS[asked.size])
    try:
        {"up": up, "down": Cluster.down, "status": status}[asked.what](cluster)
    except (ClusterError, BuildError) as error:
        sys.exit(f"Error: {error}")


def up(cluster: Cluster) -> None:
    cluster.up()
    status(cluster)


def status(cluster: Cluster) -> None:
    programs = cluster.programs()
    if not programs:
        print(f"No cluster is up in {cluster.folder}.")
        return
    for name, runs in programs.items():
        print(f"{'runs ' if runs else 'ended'} {name}")
    print(f"logs: {cluster.logs}")
    print(f"API server: {cluster.server}")
    if cluster.size == "node":
        s3 = cluster.s3
        print(f"registry: {cluster.registry}")
        print(f"S3: {s3.endpoint} key: {s3.key} secret: {s3.secret}")
    print(f"export KUBECONFIG={cluster.kubeconfig}")


if __name__ == "__main__":
    main()
