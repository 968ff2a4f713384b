"""The image of a step whose training is a job: small, and with everything the step imports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from container.podman import LOCKED_DOWN, Podman, give
from container.test_components import start

from srccore.containers.names import LAUNCH_TRAINING, Images
from srccore.steps.step import Reference

IMPORTS = """
import importlib, importlib.util, os, pkgutil
import kubernetes.client, kubernetes.config, kubernetes.watch
import srccore.cluster
from srccore.stages.table import STAGES
for each in pkgutil.iter_modules(srccore.cluster.__path__):
    importlib.import_module(f"srccore.cluster.{each.name}")
for stage in STAGES.values():
    if stage.trains:
        stage.function()
left_out = ("torch", "transformers", "pyarrow", "PIL", "openai")
print(os.getuid(), [name for name in left_out if importlib.util.find_spec(name)])
"""


@pytest.fixture(scope="module")
def image(podman: Podman) -> str:
    podman.build(LAUNCH_TRAINING)
    return Images().of(LAUNCH_TRAINING)


def test_the_code_of_the_step_needs_no_torch_and_no_data_set_packages(
    podman: Podman, image: str
) -> None:
    options = ["--rm", *LOCKED_DOWN, "--memory=512m"]
    printed = podman.run("run", *options, image, "python3", "-c", IMPORTS)
    assert printed == "1000 []\n"


def test_the_component_starts_in_it_and_asks_for_a_bucket(
    podman: Podman, image: str, tmp_path: Path
) -> None:
    base = {"path": "embedded:lvlm", "dtype": "float32"}
    policy = {"record": "policy", "version": 1, "policy": {"base": base, "adapters": []}}
    (tmp_path / "policy").write_text(json.dumps(policy))
    for name in ("data", "preferences"):
        (tmp_path / name).write_text(Reference(uri=f"s3://bucket/{name}").model_dump_json())
    give(tmp_path)
    with pytest.raises(AssertionError, match=r"Error: .* s3://"):
        start(
            podman,
            "train-dpo",
            tmp_path,
            tmp_path,
            {
                "artifact_root": "/step/artifacts",
                "config": {},
                "launcher": "pytorchjob",
                "job": {"image": Images().of("train-dpo"), "pods": 2.0},
            },
            {name: f"/step/{name}" for name in ("data", "preferences", "policy")},
            {"aligned": "/step/aligned", "metrics": "/step/metrics"},
            image=image,
        )
