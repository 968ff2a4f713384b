"""Every stage produces the same output in its locked-down image as outside, bit for bit.

Each reads the folders of the run outside, mounted read-only at the same paths next to its own
folder, so that paths are the same and stages fail independently of each other.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from container.podman import BUILT, LOCKED_DOWN, USER, Podman, give
from local.shrunken import SETTINGS

from srccore.containers.names import IMAGES, LAUNCH_TRAINING, Images
from srccore.stages.manifest import read_manifest

DATA = {name: f"--data=data/{name}.parquet" for name in ("train", "calibration", "heldout")}
TRAIN_RATIONALES = "--rationales=augment-rationales/train"
STAGE_1 = "--policy=tune-rationale/policy.json"
FOUND = "--candidates=round-1/search-candidates-0"
RATED = "--ratings=round-1/score-candidates-0"

# By stage: its folder in the run, and its inputs.
READS: dict[str, tuple[str, list[str]]] = {
    "prepare-data": ("data", []),
    "augment-rationales": ("augment-rationales/train", [DATA["train"]]),
    "tune-rationale": ("tune-rationale", [DATA["train"], TRAIN_RATIONALES]),
    "sample-responses": ("sample-responses", [DATA["train"], STAGE_1]),
    "annotate-ratings": (
        "annotate-ratings",
        [DATA["train"], "--candidates=sample-responses", TRAIN_RATIONALES],
    ),
    "train-scorer": (
        "train-scorer",
        [DATA["train"], "--labelled-pairs=annotate-ratings", TRAIN_RATIONALES],
    ),
    "search-candidates": (
        "round-1/search-candidates-0",
        [DATA["calibration"], STAGE_1, "--round=1"],
    ),
    "score-candidates": (
        "round-1/score-candidates-0",
        [
            DATA["calibration"],
            FOUND,
            "--scorer=train-scorer",
            "--rationales=augment-rationales/calibration",
        ],
    ),
    "curate-preference": ("round-1/curate-preference", [DATA["calibration"], FOUND, RATED]),
    "train-dpo": (
        "round-1/train-dpo",
        [DATA["calibration"], "--preferences=round-1/curate-preference", STAGE_1],
    ),
    "evaluate": (
        "round-1/evaluate",
        [
            DATA["heldout"],
            "--policy=round-1/train-dpo/policy.json",
            "--round=1",
            "--previous=round-0/evaluate",
        ],
    ),
}


def _memory(image: str) -> str:
    return "--memory=2g" if IMAGES[image] == "models" else "--memory=512m"


def _in_container(podman: Podman, stage: str, volumes: dict[Path, str], words: list[str]) -> str:
    mounts = [f"--volume={source}:{target}" for source, target in volumes.items()]
    options = ["--rm", *LOCKED_DOWN, _memory(stage), *mounts, "--workdir=/run-folder"]
    return podman.run("run", *options, Images().of(stage), *words)


@pytest.mark.parametrize("stage", READS)
def test_a_stage_makes_in_its_image_what_it_makes_outside(
    images: Podman, run_outside: Path, tmp_path: Path, stage: str
) -> None:
    folder, reads = READS[stage]
    give(tmp_path)
    settings = [f"--set={setting}" for setting in SETTINGS]
    _in_container(
        images,
        stage,
        {run_outside: "/run-folder:ro", tmp_path: f"/run-folder/{folder}"},
        ["srccore", "stage", stage, *reads, f"--out={folder}", *settings],
    )
    inside, outside = read_manifest(tmp_path), read_manifest(run_outside / folder)
    assert inside.outputs == outside.outputs
    assert inside.key == outside.key


def test_the_report_is_the_same_page_but_for_its_date(
    images: Podman, run_outside: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_outside, copy)
    give(copy)
    (copy / "report.html").unlink()
    _in_container(images, "report", {copy: "/run-folder"}, ["srccore", "report", "."])
    inside, outside = (
        re.sub(r"<time datetime=.*?</time>", "", (path / "report.html").read_text())
        for path in (copy, run_outside)
    )
    assert inside == outside


@pytest.mark.parametrize("name", BUILT)
def test_an_image_is_what_a_cluster_wants(images: Podman, name: str) -> None:
    (image,) = json.loads(images.run("image", "inspect", Images().of(name)))
    settings = image["Config"]
    labels = {key.rpartition(".")[2]: value for key, value in settings["Labels"].items()}
    assert settings["User"] == f"{USER}:{USER}"
    assert not settings.get("Entrypoint")
    assert {
        "LD_LIBRARY_PATH=/usr/local/nvidia/lib64",
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    } <= set(settings["Env"])
    assert labels["title"] == f"srccore/{name}"
    assert labels["version"] == Images().tag
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["revision"])


@pytest.mark.parametrize("name", ["import-output", "evaluate", LAUNCH_TRAINING])
def test_a_step_of_kubeflow_finds_its_executor_whatever_the_user(images: Podman, name: str) -> None:
    check = "import getpass, os, srccore; print(os.getuid(), getpass.getuser())"
    command = f"python3 -c '{check}' && python3 -m kfp.dsl.executor_main --help"
    options = ["--rm", *LOCKED_DOWN, _memory(name), "--user=12345:0", "--env=_KFP_RUNTIME=true"]
    printed = images.run("run", *options, Images().of(name), "sh", "-c", command)
    assert printed.startswith("12345 srccore\n")
    assert "--executor_input" in printed


def test_what_is_made_at_run_time_goes_to_tmp_and_nowhere_else(images: Podman) -> None:
    command = "touch /tmp/yes && ! touch /opt/no /etc/no /var/no $HOME/../no"
    images.run("run", "--rm", *LOCKED_DOWN, Images().of("report"), "sh", "-c", command)
