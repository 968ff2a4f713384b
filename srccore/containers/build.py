"""Builds and pushes the container images with podman, buildah or docker, whichever is there.

Assumes a checkout with git, since the Containerfiles and the lock files of ``images/`` are no part
of the installed package. An image is a thin layer, the wheel, on the environment of its base;
bases hold no code of ours and carry a fixed time, so that a new commit leaves their layers as they
are, byte for byte. Two builds of one commit are equal but for what docker stamps.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from srccore.containers.names import BASES, IMAGES, Base, Images
from srccore.errors import UserError

__all__ = [
    "DEFAULT_BASE_IMAGE",
    "Build",
    "Built",
    "Checkout",
    "Tool",
    "base_build",
    "build_images",
    "find_tool",
    "image_build",
    "open_checkout",
    "push_images",
    "write_contexts",
]

Tool = Literal["podman", "buildah", "docker"]
TOOLS: tuple[Tool, ...] = get_args(Tool)

DEFAULT_BASE_IMAGE = "docker.io/library/python:3.11-slim-bookworm"
"""Any Debian with Python 3.11 and its venv module serves."""
BASE_TIME = 315532800
"""1980-01-01, the first time that a zip file can tell."""
SOURCES = (
    *("srccore", "components", "pipelines"),
    *("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"),
)
"""What the wheel is built from."""
LOCAL = Images()
LAST_LINES = 8
LINE_LENGTH = 240


@dataclass(frozen=True)
class Checkout:
    """The source that images are built from.

    Args:
        root: Its folder.
        revision: The commit, with ``-dirty`` where files differ from it.
        committed: When, in seconds since 1970.
        version: Of srccore.
    """

    root: Path
    revision: str
    committed: int
    version: str = LOCAL.tag


@dataclass(frozen=True)
class Build:
    """How one image is built.

    Args:
        image: Its name.
        context: The folder with its Containerfile.
        arguments: Build arguments.
        labels: Labels, without ``org.opencontainers.image.``.
        stamp: The time of the image and its files, in seconds since 1970.
    """

    image: str
    context: Path
    arguments: Mapping[str, str]
    labels: Mapping[str, str] = field(default_factory=dict)
    stamp: int = BASE_TIME

    def command(self, tool: Tool, extra: Sequence[str] = ()) -> list[str]:
        """The command, word by word; docker takes the time from ``SOURCE_DATE_EPOCH`` alone."""
        words = [tool, "build", "--tag", self.image, "--file", str(self.context / "Containerfile")]
        if tool != "docker":
            words += ["--layers", "--timestamp", str(self.stamp)]
        for name, value in self.arguments.items():
            words += ["--build-arg", f"{name}={value}"]
        for name, value in self.labels.items():
            words += ["--label", f"org.opencontainers.image.{name}={value}"]
        return [*words, *extra, str(self.context)]


@dataclass(frozen=True)
class Built:
    """An image that has been built.

    Args:
        name: The image.
        seconds: What it took.
        size: All of its layers, as the tool writes it.
    """

    name: str
    seconds: float
    size: str


def find_tool(wanted: str | None = None) -> Tool:
    """Finds the program that builds.

    Args:
        wanted: Its name; None takes the first of podman, buildah and docker that is there.

    Returns:
        Its name.

    Raises:
        UserError: There is none, or not the one that is wanted.
    """
    names = [tool for tool in TOOLS if wanted in (None, tool)]
    if not names:
        raise UserError(f"{wanted} is no tool for images.", f"Name one of {', '.join(TOOLS)}.")
    for name in names:
        if shutil.which(name):
            return name
    raise UserError(
        f"Images are built and pushed with {' or '.join(names)}, which is not on the PATH.",
        "Install it: apt-get install podman.",
    )


def open_checkout(root: Path | None = None) -> Checkout:
    """Looks at the checkout that this package runs from.

    Args:
        root: Another folder than that.

    Returns:
        The checkout.

    Raises:
        UserError: The package does not run from a checkout, or git cannot read it.
    """
    root = root or Path(__file__).parents[2]
    if not all((root / name).exists() for name in ("pyproject.toml", "images/stage/Containerfile")):
        raise UserError(
            f"{root} is no checkout of the project, and images are built from one.",
            "Clone the repository, install it with make env, and run the command there.",
        )
    revision, committed = _run(
        ["git", "-C", str(root), "log", "-1", "--format=%H\n%ct"], "Images carry their commit."
    ).split()
    changes = _run(["git", "-C", str(root), "status", "--porcelain"], "See what git says.")
    return Checkout(root, revision + ("-dirty" if changes else ""), int(committed))


def build_images(
    tool: Tool,
    checkout: Checkout,
    names: Sequence[str] = (),
    *,
    base_image: str = DEFAULT_BASE_IMAGE,
    source: str = "",
    extra: Sequence[str] = (),
    starting: Callable[[str], None] = lambda _name: None,
) -> Iterator[Built]:
    """Builds the bases that are needed, then the images on them.

    Args:
        tool: The program that builds.
        checkout: What is built.
        names: Which; none means all.
        base_image: What the bases stand on.
        source: Where the source can be found, for the label.
        extra: Further arguments of the tool, for every image.
        starting: Told of an image before it is built.

    Yields:
        What has been built.

    Raises:
        UserError: There is no such image, or the tool failed.
    """
    wanted = _known(names)
    bases = [base for base in BASES if any(IMAGES[name] == base for name in wanted)]
    with tempfile.TemporaryDirectory(prefix="srccore-images-") as folder:
        contexts = Path(folder)
        write_contexts(checkout, bases, contexts)
        builds = [base_build(base, contexts, base_image) for base in bases]
        builds += [image_build(name, contexts, checkout, source) for name in wanted]
        for build in builds:
            starting(build.image)
            began = time.monotonic()
            _run(
                build.command(tool, extra),
                "Behind a proxy, pass on what docs/images.md says.",
                {"SOURCE_DATE_EPOCH": str(build.stamp)},
            )
            yield Built(build.image, time.monotonic() - began, _size(tool, build.image))


def write_contexts(checkout: Checkout, bases: Sequence[Base], folder: Path) -> None:
    """Writes what the builds read and nothing else: a folder for each base, one for the images.

    Args:
        checkout: What is built.
        bases: Which bases.
        folder: Gets the folders; is there and empty.
    """
    images = checkout.root / "images"
    for base in bases:
        shutil.copytree(images / "base", folder / base)
        shutil.copytree(images / base, folder / base, dirs_exist_ok=True)
        for lock in images.glob("*.lock"):
            shutil.copy(lock, folder / base)
    shutil.copytree(images / "stage", folder / "stage")
    _build_wheel(checkout, folder / "stage")
    for path in folder.rglob("*"):
        # Neither the clock nor the umask of this machine goes into an image.
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (BASE_TIME, BASE_TIME))


def base_build(base: Base, contexts: Path, base_image: str) -> Build:
    """How a base is built: the same, whatever the commit."""
    return Build(LOCAL.of(f"base-{base}"), contexts / base, arguments={"BASE_IMAGE": base_image})


def image_build(name: str, contexts: Path, checkout: Checkout, source: str) -> Build:
    """How an image is built, on a base that is there."""
    (wheel,) = (contexts / "stage").glob("*.whl")
    labels = {
        "title": f"srccore/{name}",
        "version": checkout.version,
        "revision": checkout.revision,
        "licenses": "Apache-2.0",
        "source": source,
    }
    return Build(
        LOCAL.of(name),
        contexts / "stage",
        arguments={
            "BASE": LOCAL.of(f"base-{IMAGES[name]}"),
            "WHEEL_SHA256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        },
        labels={label: value for label, value in labels.items() if value},
        stamp=checkout.committed,
    )


def push_images(
    tool: Tool,
    registry: str,
    *,
    tls_verify: bool = True,
    starting: Callable[[str], None] = lambda _name: None,
) -> Iterator[str]:
    """Pushes all images; layers that several share are sent once.

    Args:
        tool: The program that pushes.
        registry: Host and path before ``/srccore/<name>``.
        tls_verify: Whether the registry must show a certificate that is trusted.
        starting: Told of an image before it is pushed.

    Yields:
        ``<repository>@sha256:...`` of every image, with the digest that the registry took.

    Raises:
        UserError: An image has not been built, or the tool failed.
    """
    if tool == "docker" and not tls_verify:
        raise UserError(
            "docker has no switch for a registry without TLS.",
            "Name the registry in insecure-registries of the daemon's configuration, or use "
            "--tool podman.",
        )
    remote = Images(registry)
    push = _push_with_docker if tool == "docker" else _push
    for name in IMAGES:
        starting(remote.of(name))
        digest = push(tool, LOCAL.of(name), remote.of(name), tls_verify)
        yield Images(registry, digests={name: digest}).of(name)


_PUSH_ADVICE = "Build the images first with srccore images build, and log in with {} login."


def _push(tool: Tool, image: str, target: str, tls_verify: bool) -> str:
    with tempfile.TemporaryDirectory() as folder:
        digest = Path(folder) / "digest"
        command = [tool, "push", "--digestfile", str(digest), f"--tls-verify={tls_verify}".lower()]
        _run([*command, image, f"docker://{target}"], _PUSH_ADVICE.format(tool))
        return digest.read_text(encoding="ascii").strip()


def _push_with_docker(tool: Tool, image: str, target: str, _tls_verify: bool) -> str:
    advice = _PUSH_ADVICE.format(tool)
    _run([tool, "tag", image, target], advice)
    _run([tool, "push", target], advice)
    listed = "{{range .RepoDigests}}{{println .}}{{end}}"
    digests = _run([tool, "image", "inspect", "--format", listed, target], advice).split()
    repository = target.rpartition(":")[0]
    return next(d.partition("@")[2] for d in digests if d.startswith(f"{repository}@"))


def _build_wheel(checkout: Checkout, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    with tempfile.TemporaryDirectory() as scratch:
        # In the checkout, setuptools would pack what an earlier build left behind.
        for name in SOURCES:
            source, target = checkout.root / name, Path(scratch) / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, target)
        _run(
            [*command, str(folder), scratch],
            "The wheel is built by pip with setuptools, which pip must be able to download.",
            {"SOURCE_DATE_EPOCH": str(checkout.committed)},
        )


def _known(names: Sequence[str]) -> list[str]:
    """The images asked for, in the order of the method.

    Raises:
        UserError: There is no such image.
    """
    if unknown := [name for name in names if name not in IMAGES]:
        raise UserError(
            f"There is no image {', '.join(unknown)}.", f"Name some of {', '.join(IMAGES)}."
        )
    return [name for name in IMAGES if not names or name in names]


def _size(tool: Tool, image: str) -> str:
    listed = _run([tool, "images", "--format", "{{.Size}}", image], "See what the tool says.")
    return listed.splitlines()[-1].strip()


def _run(command: Sequence[str], advice: str, environment: Mapping[str, str] | None = None) -> str:
    """Runs a program to its end.

    Returns:
        What it printed.

    Raises:
        UserError: It failed; says its last lines.
    """
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise UserError(f"{command[0]} cannot be run ({error.strerror}).", advice) from None
    assert process.stdout is not None
    try:
        lines = list(process.stdout)
        code = process.wait()
    except BaseException:
        # Ctrl-C: left alone, the tool would go on for minutes.
        process.terminate()
        process.wait()
        raise
    if code:
        last = "\n".join(line.strip()[:LINE_LENGTH] for line in lines[-LAST_LINES:])
        raise UserError(
            f"{' '.join(command[:2])} failed with exit code {code}.",
            f"{advice} Its last lines:\n{last}",
        )
    return "".join(lines).strip()
