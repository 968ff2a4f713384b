"""What a build shares, and that it can be repeated."""

from __future__ import annotations

import json
from typing import Any

from container.podman import Podman, base_image

from srccore.images import BASES, STAGES, Images

LIGHT_LIMIT = 250_000_000


def _inspect(podman: Podman, image: str) -> dict[str, Any]:
    (found,) = json.loads(podman.run("image", "inspect", image))
    return found


def test_two_builds_of_one_commit_are_the_same_image(images: Podman) -> None:
    ids = []
    for _ in range(2):
        images.build("report", extra=["--no-cache"])
        names = [Images().of(name) for name in ("base-light", "report")]
        ids.append([_inspect(images, name)["Id"] for name in names])
    images.run("image", "prune", "--force")
    assert ids[0] == ids[1]


def test_a_build_with_nothing_new_makes_no_new_layer(images: Podman) -> None:
    before = _inspect(images, Images().of("train-dpo"))["Id"]
    images.build("train-dpo")
    assert _inspect(images, Images().of("train-dpo"))["Id"] == before


def test_a_stage_adds_one_small_layer_to_its_base(images: Podman) -> None:
    bases = {base: _inspect(images, Images().of(f"base-{base}")) for base in BASES}
    for stage, base in STAGES.items():
        image = _inspect(images, Images().of(stage))
        shared = bases[base]["RootFS"]["Layers"]
        assert image["RootFS"]["Layers"][: len(shared)] == shared
        assert len(image["RootFS"]["Layers"]) == len(shared) + 1
        assert image["Size"] - bases[base]["Size"] < 20_000_000


def test_a_light_image_stays_under_its_limit(images: Podman) -> None:
    light = _inspect(images, Images().of("report"))["Size"]
    assert light - _inspect(images, base_image(images))["Size"] < LIGHT_LIMIT
