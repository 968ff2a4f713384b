"""Renders folders of manifests/ with kubectl, and reads what comes out."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.build import program

MANIFESTS = Path(__file__).parents[1] / "manifests"
ADMIN = ("admin", "admin/kueue")
OVERLAYS = tuple(sorted(f"overlays/{path.name}" for path in (MANIFESTS / "overlays").iterdir()))
FOLDERS = (*ADMIN, "base", *OVERLAYS)
"""All that can be rendered; components cannot be rendered alone."""

Manifest = dict[str, Any]


def kubectl() -> str:
    """The tests' own kubectl, or else the machine's; without one, the test is skipped."""
    found = program("kubectl") or shutil.which("kubectl")
    if found is None:
        pytest.skip("there is no kubectl: python -m tests.cluster.build kubernetes")
    return str(found)


def render(folder: Path) -> list[Manifest]:
    """The objects of a kustomization."""
    command = [kubectl(), "kustomize", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # kustomize warns about deprecated fields
    return [each for each in yaml.safe_load_all(done.stdout) if each]


@functools.cache
def rendered(name: str) -> list[Manifest]:
    """The objects of a folder of manifests/, shared by all tests: do not change them."""
    return render(MANIFESTS / name)


def copied(to: Path, overlay: str = "eks", text: str = "", namespace: str = "srccore") -> Path:
    """A site's own overlay, made as the page describes: a changed copy.

    Args:
        to: Where all of manifests/ goes.
        overlay: The overlay that ``overlays/site`` is copied from.
        text: Added to its kustomization.
        namespace: The namespace of all objects.

    Returns:
        The site's overlay.
    """
    shutil.copytree(MANIFESTS, to / "manifests")
    site = to / "manifests/overlays/site"
    shutil.copytree(MANIFESTS / "overlays" / overlay, site)
    with (site / "kustomization.yaml").open("a", encoding="utf-8") as file:
        file.write(text)
    for path in (to / "manifests").rglob("kustomization.yaml"):
        found = path.read_text("utf-8")
        moved = re.sub(r"(?m)^namespace: srccore$", f"namespace: {namespace}", found)
        path.write_text(moved, encoding="utf-8")
    return site


def only(objects: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The one object of a kind, or of a kind and name."""
    (found,) = (
        each
        for each in objects
        if each["kind"] == kind and name in (None, each["metadata"]["name"])
    )
    return found


def of_kind(objects: list[Manifest], kind: str) -> list[Manifest]:
    return [each for each in objects if each["kind"] == kind]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
