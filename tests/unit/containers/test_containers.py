"""How images are built and pushed, as far as this can be tested without a container tool.

Here the tools are small programs that log their arguments; tests/container uses a real one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from srccore.containers.build import Build, build_images, find_tool, open_checkout, push_images
from srccore.containers.names import IMAGES
from srccore.errors import UserError

DIGEST = "sha256:" + "7" * 64


class Tools:
    """A folder of programs that makes up the PATH, and the arguments that they got."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "asked"

    def add(self, name: str, script: str = "") -> None:
        path = self.folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.log}\n{script}\n')
        path.chmod(0o755)

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return Tools(folder)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one commit."""
    root = tmp_path / "checkout"
    (root / "images/stage").mkdir(parents=True)
    for name in ("pyproject.toml", "images/stage/Containerfile"):
        (root / name).write_text("")
    identity = ["-c", "user.name=Someone", "-c", "user.email=someone@example.com"]
    commit = [*identity, "commit", "--quiet", "-m", "First", "--date", "2026-01-02T03:04:05Z"]
    for words in (["init", "--quiet"], ["add", "."], commit):
        subprocess.run(["git", "-C", root, *words], check=True)
    return root


BUILD = Build("localhost/x:1", Path("/context"), {"BASE": "b"}, {"title": "t"}, 5)


@pytest.mark.parametrize("tool", ["podman", "buildah"])
def test_podman_and_buildah_are_told_the_time_of_the_files(tool: str) -> None:
    assert BUILD.command(tool, ["--network=host"]) == [
        *(tool, "build", "--tag", "localhost/x:1", "--file", "/context/Containerfile"),
        *("--layers", "--timestamp", "5", "--build-arg", "BASE=b"),
        *("--label", "org.opencontainers.image.title=t", "--network=host", "/context"),
    ]


def test_docker_is_given_only_what_it_knows() -> None:
    assert BUILD.command("docker") == [
        *("docker", "build", "--tag", "localhost/x:1", "--file", "/context/Containerfile"),
        *("--build-arg", "BASE=b", "--label", "org.opencontainers.image.title=t", "/context"),
    ]


def test_the_first_tool_that_is_there_is_taken_unless_one_is_named(tools: Tools) -> None:
    tools.add("docker")
    tools.add("buildah")
    assert find_tool() == "buildah"
    assert find_tool("docker") == "docker"
    with pytest.raises(UserError, match="podman, which is not on the PATH"):
        find_tool("podman")


def test_a_machine_without_a_tool_is_told_what_to_install(tools: Tools) -> None:
    with pytest.raises(UserError, match="podman or buildah or docker, which is not on the PATH"):
        find_tool()
    with pytest.raises(UserError, match="kaniko cannot build images"):
        find_tool("kaniko")


def test_a_checkout_has_its_commit_and_says_where_it_differs(checkout: Path) -> None:
    clean = open_checkout(checkout)
    assert re.fullmatch(r"[0-9a-f]{40}", clean.revision)
    (checkout / "new").write_text("")
    changed = open_checkout(checkout)
    assert changed.revision == f"{clean.revision}-dirty"
    assert changed.committed == clean.committed


def test_an_installed_package_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a checkout of the project"):
        open_checkout(tmp_path)


def test_a_checkout_without_history_is_told_what_git_says(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    with pytest.raises(UserError, match=r"(?s)git -C failed .*not a git repository"):
        open_checkout(checkout)


def test_an_image_that_is_not_there_is_named_before_anything_is_built(checkout: Path) -> None:
    with pytest.raises(UserError, match="Unknown image evaluat"):
        next(build_images("podman", open_checkout(checkout), ["evaluat"]))


def test_a_failing_tool_has_the_last_word(tools: Tools) -> None:
    tools.add("podman", "echo first; echo 'no such image' >&2; exit 125")
    with pytest.raises(
        UserError, match=r"(?s)exit code 125.*images build.*:\nfirst\nno such image"
    ):
        next(push_images("podman", "r.example.com"))


def test_a_push_tells_the_digest_that_the_tool_wrote(tools: Tools) -> None:
    tools.add("podman", f"echo {DIGEST} > $3")
    lines = list(push_images("podman", "r.example.com", tls_verify=False))
    assert lines == [f"r.example.com/srccore/{name}@{DIGEST}" for name in IMAGES]
    assert re.fullmatch(
        r"podman push --digestfile \S+ --tls-verify=false "
        r"localhost/srccore/(\S+):(\S+) docker://r\.example\.com/srccore/\1:\2",
        tools.asked()[0],
    )


def test_docker_tags_first_and_is_asked_for_the_digest_of_this_registry(tools: Tools) -> None:
    others = f"other.example.com/srccore/x@sha256:{'8' * 64}"
    tools.add("docker", f'[ "$1" = image ] && echo "{others} ${{5%:*}}@{DIGEST}"; exit 0')
    lines = list(push_images("docker", "r.example.com"))
    assert lines == [f"r.example.com/srccore/{name}@{DIGEST}" for name in IMAGES]
    assert [words.split()[1] for words in tools.asked()[:3]] == ["tag", "push", "image"]


def test_docker_has_no_switch_for_a_registry_without_tls(tools: Tools) -> None:
    with pytest.raises(UserError, match="insecure-registries"):
        next(push_images("docker", "r.example.com", tls_verify=False))
