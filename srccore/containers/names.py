"""The names of the container images: one per stage and two more, on four shared bases.

Components, the compiler and the image build all take the names from here. Imports nothing but the
standard library, since importing a component must not need more than kfp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import srccore
from srccore.errors import UserError
from srccore.stages.table import STAGES

__all__ = [
    "BASES",
    "CACHE",
    "DEFAULT_REGISTRY",
    "IMAGES",
    "LAUNCH_TRAINING",
    "USER_ID",
    "VLLM",
    "Base",
    "Images",
    "read_digests",
]

Base = Literal["light", "models", "launcher", "vllm"]

LAUNCH_TRAINING = "launch-training"
"""The image of a step whose training runs as a job: it starts the job and watches it."""
VLLM = "vllm"
"""The image of all stages whose engine is vLLM."""
IMAGES: Mapping[str, Base] = {
    **{stage.name: stage.base for stage in STAGES.values()},
    LAUNCH_TRAINING: "launcher",
    VLLM: "vllm",
}
"""Every image, and its base; ``launcher`` has the client of Kubernetes, and reads no data set."""
BASES: tuple[Base, ...] = ("light", "models", "launcher", "vllm")

USER_ID = 1000
"""The user of every image."""
CACHE = "/tmp/cache"
"""Below this, the images keep fetched models and data: a pod mounts its cache there."""

DEFAULT_REGISTRY = "localhost"
"""Where `srccore images build` puts images; nobody else can publish there."""
_REGISTRY = re.compile(r"[A-Za-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)*/?")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Images:
    """The images of one release in one registry.

    Args:
        registry: Host and path before ``/srccore/<name>``: ``registry.example.com/team``.
        tag: The tag, for use without digests.
        digests: ``sha256:...`` by name; if there are any, an image without one is an error.

    Raises:
        UserError: The registry is not valid.
    """

    registry: str = DEFAULT_REGISTRY
    tag: str = srccore.__version__
    digests: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _REGISTRY.fullmatch(self.registry):
            raise UserError(
                f"{self.registry!r} is not a registry.",
                "Use host and path, in lower case and without https://: registry.example.com/team.",
            )

    def repository(self, name: str) -> str:
        """Returns an image's reference without tag or digest."""
        return f"{self.registry.rstrip('/')}/srccore/{name}"

    def of(self, name: str) -> str:
        """Returns the reference of a stage's image, or of another by name: ``base-<base>``.

        Raises:
            UserError: There are digests, but none for this image.
        """
        if not self.digests:
            return f"{self.repository(name)}:{self.tag}"
        if name not in self.digests:
            raise UserError(
                f"There is no digest for the image {self.repository(name)}.",
                "Push all images with srccore images push, and pass the list that it writes.",
            )
        return f"{self.repository(name)}@{self.digests[name]}"


def read_digests(path: Path, registry: str) -> dict[str, str]:
    """Reads the list that ``srccore images push`` writes: ``<repository>@sha256:...`` a line.

    Args:
        path: The list; empty lines and lines that start with ``#`` are ignored.
        registry: The registry that the images are pulled from. The list may be from another one,
            since a mirror keeps digests.

    Returns:
        Digests by the image's name.

    Raises:
        UserError: The file cannot be read or is empty, or a line is not an image with its digest.
    """
    fix = f"Make it with srccore images push --registry {registry} -o {path}."
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the list of digests {path}: {error}.", fix) from None
    found = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        repository, _, digest = text.partition("@")
        name = repository.rpartition("/")[2]
        if not _DIGEST.fullmatch(digest) or name not in IMAGES:
            raise UserError(
                f"Line {number} of {path} is not one of this project's images with its digest: "
                f"{text[:100]!r}.",
                "Write REGISTRY/srccore/NAME@sha256:... in each line, as srccore images push does.",
            )
        found[name] = digest
    if not found:
        raise UserError(f"The list of digests {path} has no images.", fix)
    return found
