"""What builds share, and that they are reproducible."""

from __future__ import annotations

import json
from typing import Any

import pytest
from container.podman import BUILT, Podman, base_image

from srccore.containers.names import IMAGES, LAUNCH_TRAINING, Images

# In addition to the image that the bases are built on, in bytes.
LIMITS = {"report": 240_000_000, LAUNCH_TRAINING: 150_000_000}


def _inspect(podman: Podman, image: str) -> dict[str, Any]:
    (found,) = json.loads(podman.run("image", "inspect", image))
    return found


def test_two_builds_of_one_commit_are_the_same_image(images: Podman) -> None:
    ids = []
    names = ("base-light", "report", "base-launcher", LAUNCH_TRAINING)
    for _ in range(2):
        images.build("report", LAUNCH_TRAINING, extra=["--no-cache"])
        ids.append([_inspect(images, Images().of(name))["Id"] for name in names])
    images.run("image", "prune", "--force")
    assert ids[0] == ids[1]


def test_a_build_with_nothing_new_makes_no_new_layer(images: Podman) -> None:
    before = _inspect(images, Images().of("train-dpo"))["Id"]
    images.build("train-dpo")
    assert _inspect(images, Images().of("train-dpo"))["Id"] == before


def test_an_image_adds_one_small_layer_to_its_base(images: Podman) -> None:
    for name in BUILT:
        base = _inspect(images, Images().of(f"base-{IMAGES[name]}"))
        image = _inspect(images, Images().of(name))
        shared = base["RootFS"]["Layers"]
        assert image["RootFS"]["Layers"][: len(shared)] == shared
        assert len(image["RootFS"]["Layers"]) == len(shared) + 1
        assert image["Size"] - base["Size"] < 20_000_000


@pytest.mark.parametrize("name", LIMITS)
def test_a_small_image_stays_under_its_limit(images: Podman, name: str) -> None:
    size = _inspect(images, Images().of(name))["Size"]
    assert size - _inspect(images, base_image(images))["Size"] < LIMITS[name]
