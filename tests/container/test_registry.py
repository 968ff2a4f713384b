"""Pushed to Debian's registry, all images are there by digest, and shared layers only once."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from container.podman import BUILT, Podman

from srccore.containers.names import Images, read_digests
from srccore.stages.table import STAGES

ACCEPT = (
    "application/vnd.oci.image.manifest.v1+json, "
    "application/vnd.docker.distribution.manifest.v2+json"
)


class Registry:
    """A registry that keeps its images in a folder and logs every request."""

    def __init__(self, folder: Path, log: Path, address: str) -> None:
        self.folder, self.log, self.address = folder, log, address

    def manifest(self, repository: str, reference: str) -> tuple[str, dict[str, Any]]:
        """The digest and the content of an image's manifest."""
        url = f"http://{self.address}/v2/{repository}/manifests/{reference}"
        request = urllib.request.Request(url, headers={"Accept": ACCEPT})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.headers["Docker-Content-Digest"], json.load(answer)

    def uploads(self) -> int:
        """How many requests have sent content of a layer so far."""
        return len(re.findall(r'"PATCH /v2/', self.log.read_text()))


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed (apt-get install docker-registry)")
    folder, settings, log = tmp_path / "registry", tmp_path / "registry.json", tmp_path / "log"
    storage = {"filesystem": {"rootdirectory": str(folder)}}
    settings.write_text(
        json.dumps({"version": 0.1, "storage": storage, "http": {"addr": "127.0.0.1:0"}})
    )
    with log.open("w") as output:
        process = subprocess.Popen(
            [program, "serve", str(settings)], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield Registry(folder, log, _address(log, process))
    finally:
        process.terminate()
        process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)  # gigabytes, which pytest would keep


def _address(log: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"listening on (127\.0\.0\.1:\d+)", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def test_every_image_is_pushed_by_digest_and_a_shared_layer_once(
    images: Podman, registry: Registry, tmp_path: Path
) -> None:
    out = tmp_path / "images.txt"
    push = ["images", "push", "--registry", registry.address, "--no-tls-verify", "-o", str(out)]
    push += [word for name in BUILT for word in ("--image", name)]
    printed = images.srccore(*push)

    assert printed == out.read_text()
    digests = read_digests(out, registry.address)
    assert list(digests) == list(BUILT)
    big_layers = set()
    for name, digest in digests.items():
        found, manifest = registry.manifest(f"srccore/{name}", digest)
        assert found == digest
        assert registry.manifest(f"srccore/{name}", Images().tag)[0] == digest
        big_layers |= {layer["digest"] for layer in manifest["layers"] if layer["size"] > 10**9}
    assert len(big_layers) == 1
    stored = [path for path in registry.folder.rglob("data") if path.stat().st_size > 10**9]
    assert len(stored) == 1

    before = registry.uploads()
    assert before > 0
    assert images.srccore(*push) == printed
    assert registry.uploads() == before

    package = tmp_path / "src.yaml"
    compiling = ["compile", "--registry", registry.address, "--digests", str(out)]
    images.srccore(*compiling, "-o", str(package))
    named = set(re.findall(r"^ +image: (\S+)$", package.read_text(), re.MULTILINE))
    assert len(named) == len(STAGES) - 1  # all except import-output, which the preset does not use
    for image in named:
        repository, _, digest = image.removeprefix(f"{registry.address}/").partition("@")
        assert registry.manifest(repository, digest)[0] == digest

    mirror = Images("mirror.example.com/src", digests=digests)
    listed = images.srccore(
        "images", "list", "--registry", "mirror.example.com/src", "--digests", str(out)
    )
    assert listed.splitlines() == [mirror.of(name) for name in BUILT]
