"""podman on this machine, with the tests' own settings, and what a build needs from the host.

`srccore images` finds podman by itself; the environment passes the settings on.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from srccore.containers.names import IMAGES, VLLM

BUILT = tuple(name for name in IMAGES if name != VLLM)
"""All but the image with vLLM, which is the largest and for GPUs."""
BASE_IMAGE = "localhost/debian-python:bookworm"
USER = 1000
LOCKED_DOWN = (
    "--network=none",
    "--read-only",
    "--tmpfs=/tmp",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
)
"""The security context of the pipeline's pods, and no network."""


class Podman:
    """Runs podman, and srccore with it.

    Args:
        folder: The folder for podman's settings.
    """

    def __init__(self, folder: Path) -> None:
        settings = folder / "containers.conf"
        settings.write_text(_settings(), encoding="utf-8")
        self.environment = {**os.environ, "CONTAINERS_CONF": str(settings)}

    def run(self, *words: str) -> str:
        """Runs podman; returns what it prints."""
        return self._run("podman", *words)

    def srccore(self, *words: str) -> str:
        """Runs a command of srccore; returns what it prints."""
        return self._run(sys.executable, "-m", "srccore", *words)

    def has(self, image: str) -> bool:
        command = ["podman", "image", "exists", image]
        return subprocess.run(command, env=self.environment, check=False).returncode == 0

    def build(self, *names: str, extra: Sequence[str] = ()) -> None:
        """Builds images like a user on this machine; no names means all of `BUILT`."""
        named = [word for name in names or BUILT for word in ("--image", name)]
        base = ["--tool", "podman", "--base-image", base_image(self)]
        self.srccore("images", "build", *base, *named, "--", *build_arguments(), *extra)

    def _run(self, *words: str) -> str:
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-4000:])
        return done.stdout


def _settings() -> str:
    """podman requests more open files than a root user without CAP_SYS_RESOURCE may set."""
    limits = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    allowed = {name: _most(resource.getrlimit(limit)[1]) for name, limit in limits.items()}
    ulimits = ", ".join(f'"{name}={most}:{most}"' for name, most in allowed.items())
    # Debian 12's crun rejects a host with both versions of cgroups mounted; runc accepts it.
    runtime = '[engine]\nruntime = "runc"\n' if shutil.which("runc") else ""
    return f"[containers]\ndefault_ulimits = [{ulimits}]\n{runtime}"


def _most(limit: int) -> int:
    return 32768 if limit == resource.RLIM_INFINITY else min(limit, 32768)


def build_arguments() -> list[str]:
    """How this machine accesses its package index, and its cache of packages."""
    words = []
    for file in ("/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt"):
        if Path(file).exists():
            words += ["--volume", f"{file}:{file}:ro"]
    cache = Path(os.environ.get("UV_CACHE_DIR", Path.home() / ".cache/uv"))
    if cache.exists():
        words += ["--volume", f"{cache}:/root/.cache/uv", "--build-arg", "UV_NO_CACHE=0"]
    return words


def give(folder: Path) -> None:
    """Gives a folder to the containers' user: only the owner of weights can read them."""
    subprocess.run(["chown", "--recursive", f"{USER}:{USER}", folder], check=True)


def base_image(podman: Podman) -> str:
    """A minimal Debian with Python, built from packages unless it exists."""
    if named := os.environ.get("SRCCORE_TEST_BASE_IMAGE"):
        return named
    if podman.has(BASE_IMAGE):
        return BASE_IMAGE
    if shutil.which("debootstrap") is None:
        pytest.skip("needs debootstrap, or an image that SRCCORE_TEST_BASE_IMAGE names")
    with tempfile.TemporaryDirectory(prefix="srccore-debian-") as name:
        root, packed = Path(name) / "root", Path(name) / "root.tar"
        command = ["debootstrap", "--variant=minbase", "--include=python3,python3-venv"]
        subprocess.run(
            [*command, "bookworm", str(root), *_mirror()], check=True, capture_output=True
        )
        shutil.rmtree(root / "var/cache/apt/archives")
        subprocess.run(["tar", "-C", str(root), "-cf", str(packed), "."], check=True)
        podman.run("import", str(packed), BASE_IMAGE)
    return BASE_IMAGE


def _mirror() -> list[str]:
    """The mirror from which apt gets bookworm; empty for debootstrap's default."""
    command = [
        "apt-get",
        "indextargets",
        "--format",
        "$(CODENAME) $(REPO_URI)",
        "Identifier: Packages",
    ]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = [line.partition(" ")[2] for line in listed.splitlines() if line[:9] == "bookworm "]
    return found[:1]
