"""Builds and pushes the container images with podman, buildah or docker, whichever is installed.

Assumes a git checkout, since the Containerfiles and the lock files of ``images/`` are not part of
the installed package. An image is a thin layer with the wheel on top of the environment of its
base. Bases contain none of this project's code and have a fixed time, so that their layers stay
the same, byte for byte, across commits. Two builds of one commit are identical, except for the
times that docker sets.
"""

from __future__ import annotations

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
from srccore.hashing import hash_file

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
"""Any Debian with Python 3.11 and its venv module works."""
BASE_TIME = 315532800
"""1980-01-01, the earliest time that a zip file can represent."""
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
        root: The folder of the checkout.
        revision: The commit, with ``-dirty`` if files differ from it.
        committed: The time of the commit, in seconds since 1970.
    """

    root: Path
    revision: str
    committed: int


@dataclass(frozen=True)
class Build:
    """How one image is built.

    Args:
        image: The name of the image.
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
        """The command as a list; docker only takes the time from ``SOURCE_DATE_EPOCH``."""
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
        seconds: How long it took.
        size: The size of all its layers, as the tool formats it.
    """

    name: str
    seconds: float
    size: str


def find_tool(wanted: str | None = None) -> Tool:
    """Finds the program that builds.

    Args:
        wanted: Its name; None means the first of podman, buildah and docker that is installed.

    Returns:
        Its name.

    Raises:
        UserError: None is installed, or not the requested one.
    """
    names = [tool for tool in TOOLS if wanted in (None, tool)]
    if not names:
        raise UserError(f"{wanted} cannot build images.", f"Choose one of {', '.join(TOOLS)}.")
    for name in names:
        if shutil.which(name):
            return name
    raise UserError(
        f"Building and pushing images requires {' or '.join(names)}, which is not on the PATH.",
        "Install it; podman with apt-get install podman.",
    )


def open_checkout(root: Path | None = None) -> Checkout:
    """Opens the checkout that this package runs from.

    Args:
        root: The folder of another checkout.

    Returns:
        The checkout.

    Raises:
        UserError: The package does not run from a checkout, or git cannot read it.
    """
    root = root or Path(__file__).parents[2]
    if not all((root / name).exists() for name in ("pyproject.toml", "images/stage/Containerfile")):
        raise UserError(
            f"{root} is not a checkout of the project, which is required to build images.",
            "Clone the repository, install it with make env, and run the command there.",
        )
    revision, committed = _run(
        ["git", "-C", str(root), "log", "-1", "--format=%H\n%ct"],
        "Images are labelled with the commit.",
    ).split()
    changes = _run(["git", "-C", str(root), "status", "--porcelain"], "Fix what git reports.")
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
        checkout: The source.
        names: The images to build; empty means all.
        base_image: The image that the bases are built on.
        source: The URL of the source, for the label.
        extra: Additional arguments of the tool, for every image.
        starting: Called with the name of each image before it is built.

    Yields:
        The images, once they are built.

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
                "Behind a proxy, pass the options that docs/images.md lists.",
                {"SOURCE_DATE_EPOCH": str(build.stamp)},
            )
            yield Built(build.image, time.monotonic() - began, _size(tool, build.image))


def write_contexts(checkout: Checkout, bases: Sequence[Base], folder: Path) -> None:
    """Writes the files that the builds need: a folder for each base, and one for the images.

    Args:
        checkout: The source.
        bases: The bases to build.
        folder: An empty folder to write to.
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
        # Keep the clock and the umask of this machine out of the images.
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (BASE_TIME, BASE_TIME))


def base_build(base: Base, contexts: Path, base_image: str) -> Build:
    """How a base is built: the same way for every commit."""
    return Build(LOCAL.of(f"base-{base}"), contexts / base, arguments={"BASE_IMAGE": base_image})


def image_build(name: str, contexts: Path, checkout: Checkout, source: str) -> Build:
    """How an image is built on an existing base."""
    (wheel,) = (contexts / "stage").glob("*.whl")
    labels = {
        "title": f"srccore/{name}",
        "version": LOCAL.tag,
        "revision": checkout.revision,
        "licenses": "Apache-2.0",
        "source": source,
    }
    return Build(
        LOCAL.of(name),
        contexts / "stage",
        arguments={
            "BASE": LOCAL.of(f"base-{IMAGES[name]}"),
            "WHEEL_SHA256": hash_file(wheel),
        },
        labels={label: value for label, value in labels.items() if value},
        stamp=checkout.committed,
    )


def push_images(
    tool: Tool,
    registry: str,
    names: Sequence[str] = (),
    *,
    tls_verify: bool = True,
    starting: Callable[[str], None] = lambda _name: None,
) -> Iterator[str]:
    """Pushes images; shared layers are sent once.

    Args:
        tool: The program that pushes.
        registry: Host and path before ``/srccore/<name>``.
        names: The images to push; empty means all.
        tls_verify: Whether to require HTTPS with a trusted certificate.
        starting: Called with the name of each image before it is pushed.

    Yields:
        ``<repository>@sha256:...`` of every image, with its digest in the registry.

    Raises:
        UserError: There is no such image, it has not been built, or the tool failed.
    """
    if tool == "docker" and not tls_verify:
        raise UserError(
            "docker has no option for a registry without TLS.",
            "Add the registry to insecure-registries in the configuration of the Docker daemon, or "
            "use --tool podman.",
        )
    remote = Images(registry)
    push = _push_with_docker if tool == "docker" else _push
    for name in _known(names):
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
        # In the checkout, setuptools would include the remains of earlier builds.
        for name in SOURCES:
            source, target = checkout.root / name, Path(scratch) / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, target)
        _run(
            [*command, str(folder), scratch],
            "pip builds the wheel with setuptools, which it must be able to download.",
            {"SOURCE_DATE_EPOCH": str(checkout.committed)},
        )


def _known(names: Sequence[str]) -> list[str]:
    """The requested images, in the order of the method.

    Raises:
        UserError: There is no such image.
    """
    if unknown := [name for name in names if name not in IMAGES]:
        raise UserError(f"Unknown image {', '.join(unknown)}.", f"Choose from {', '.join(IMAGES)}.")
    return [name for name in IMAGES if not names or name in names]


def _size(tool: Tool, image: str) -> str:
    listed = _run([tool, "images", "--format", "{{.Size}}", image], "Fix what the tool reports.")
    return listed.splitlines()[-1].strip()


def _run(command: Sequence[str], advice: str, environment: Mapping[str, str] | None = None) -> str:
    """Runs a program and waits for it.

    Returns:
        Its output.

    Raises:
        UserError: It failed; the message includes its last lines.
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
        raise UserError(f"Cannot run {command[0]} ({error.strerror}).", advice) from None
    assert process.stdout is not None
    try:
        lines = list(process.stdout)
        code = process.wait()
    except BaseException:
        # Ctrl-C: without this, the tool would continue for minutes.
        process.terminate()
        process.wait()
        raise
    if code:
        last = "\n".join(line.strip()[:LINE_LENGTH] for line in lines[-LAST_LINES:])
        raise UserError(
            f"{' '.join(command[:2])} failed with exit code {code}.",
            f"{advice} Last lines of its output:\n{last}",
        )
    return "".join(lines).strip()
