"""Components in their images, started with the same command as by Kubeflow in a pod."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from container.podman import LOCKED_DOWN, Podman, give
from local.shrunken import shrunken

from srccore.stages.manifest import read_manifest

COMPONENTS = Path(__file__).parents[2] / "components"


def start(
    podman: Podman,
    stage: str,
    work: Path,
    run: Path,
    parameters: Mapping[str, Any],
    artifacts: Mapping[str, str],
    outputs: Mapping[str, str],
    image: str | None = None,
) -> None:
    """Runs a component, in its own image or another: files are paths below ``/step``."""
    file = COMPONENTS / stage.replace("-", "_") / "component.yaml"
    spec = next(yaml.safe_load_all(file.read_text()))
    (executor,) = spec["deploymentSpec"]["executors"].values()
    given = {
        "inputs": {
            "parameterValues": dict(parameters),
            "artifacts": {name: _artifact(name, uri) for name, uri in artifacts.items()},
        },
        "outputs": {
            "artifacts": {name: _artifact(name, uri) for name, uri in outputs.items()},
            "outputFile": f"/step/{stage}.json",
        },
    }
    container = executor["container"]
    words = [word.replace("{{$}}", json.dumps(given)) for word in container["args"]]
    options = ["--rm", *LOCKED_DOWN, "--memory=2g", f"--volume={work}:/step"]
    options += [f"--volume={run}:/run-folder:ro"]
    podman.run("run", *options, image or container["image"], *container["command"], *words)


def _artifact(name: str, uri: str) -> dict[str, Any]:
    kind = {"schemaTitle": "system.Artifact", "schemaVersion": "0.0.1"}
    return {"artifacts": [{"name": name, "type": kind, "uri": uri, "metadata": {}}]}


def test_a_component_runs_in_its_image_as_kubeflow_starts_it(
    images: Podman, run_outside: Path, tmp_path: Path
) -> None:
    config = shrunken()
    give(tmp_path)
    paths = {"data": "data/calibration.parquet", "policy": "tune-rationale/policy.json"}
    for name, path in paths.items():
        start(
            images,
            "import-output",
            tmp_path,
            run_outside,
            {"uri": f"/run-folder/{path}"},
            {},
            {"output": f"/step/{name}"},
        )
    start(
        images,
        "search-candidates",
        tmp_path,
        run_outside,
        {
            "artifact_root": "/step/artifacts",
            "config": config.search.model_dump(mode="json"),
            "round_number": 1,
            "seed": config.seed,
            "shard": 0,
            "shards": 1,
            "device": "cpu",
            "threads": 1,
        },
        {name: f"/step/{name}" for name in paths},
        {"candidates": "/step/candidates"},
    )
    reference = json.loads((tmp_path / "candidates").read_text())
    found = tmp_path / Path(reference["uri"]).relative_to("/step")
    outside = read_manifest(run_outside / "round-1" / "search-candidates-0")
    assert read_manifest(found).outputs == outside.outputs
