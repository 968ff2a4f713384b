"""A stage on vLLM runs in its image, as the pods of a pipeline run it.

vLLM for GPUs does not start without one, so this image is built by the project's own build with the
build of vLLM for CPUs that the other tests use (`tests/vllm/requirements.lock`).
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from container.podman import LOCKED_DOWN, Podman, base_image, build_arguments, give
from local.shrunken import shrunken

from srccore.containers.build import SOURCES, Checkout, build_images, open_checkout
from srccore.containers.names import VLLM, Images
from srccore.data.records import CandidateSet, read_records
from srccore.models.policy import Policy, write_policy
from srccore.stages.manifest import read_manifest
from srccore.stages.table import STAGES

ROOT = Path(__file__).parents[2]
NUMA = "/usr/lib/x86_64-linux-gnu/libnuma.so.1"


def for_cpus(folder: Path) -> Checkout:
    """This checkout, with the packages for CPUs.

    Their metadata asks for builds of torch that only torch's own index has, which `pip check`
    refuses; the usual ones work.
    """
    for name in (*SOURCES, "images"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, folder / name)
    shutil.copy2(ROOT / "tests/vllm/requirements.lock", folder / "images/vllm/requirements.lock")
    for name in ("base", "stage"):
        file = folder / "images" / name / "Containerfile"
        lines = file.read_text().splitlines(keepends=True)
        kept = [line for line in lines if "pip check" not in line or line.startswith("#")]
        assert len(kept) == len(lines) - 1
        file.write_text("".join(kept))
    return dataclasses.replace(open_checkout(), root=folder)


def test_a_search_on_vllm_runs_in_its_image(
    podman: Podman, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in podman.environment.items():
        monkeypatch.setenv(name, value)
    built = build_images(
        "podman",
        for_cpus(tmp_path / "checkout"),
        [VLLM],
        base_image=base_image(podman),
        extra=build_arguments(),
    )
    assert [image.name for image in built][-1] == Images().of(VLLM)

    run = tmp_path / "run"
    settings = ("engine.name=vllm", "engine.sequences=16", "search.samples=2")
    config = shrunken(*settings)
    STAGES["prepare-data"].run(config, out=run / "data")
    write_policy(run / "policy.json", Policy(base=config.model))
    give(run)
    podman.run(
        "run",
        "--rm",
        *LOCKED_DOWN,
        "--memory=6g",
        # As the pods of a pipeline have it: vLLM's processes share memory.
        "--shm-size=1g",
        "--env=VLLM_CPU_KVCACHE_SPACE=1",
        # Only the build for CPUs needs it, and tests/vllm needs it on this machine.
        f"--volume={NUMA}:{NUMA}:ro",
        f"--volume={run}:/run-folder",
        "--workdir=/run-folder",
        Images().of(VLLM),
        *("srccore", "stage", "search-candidates", "--preset=tiny", "--round=1"),
        *("--data=data/calibration.parquet", "--policy=policy.json", "--out=found"),
        *(f"--set={setting}" for setting in settings),
    )
    assert read_manifest(run / "found").work["image_encodings"] == 2
    found = list(read_records(run / "found" / "candidates.jsonl", CandidateSet))
    assert len(found) == 2
    assert all(each.candidates for each in found)
