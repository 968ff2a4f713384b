"""Image names, lists of digests, and the contents of Containerfiles and lock files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import srccore
from srccore.cli.images import app
from srccore.containers.names import BASES, IMAGES, Images, read_digests
from srccore.errors import UserError

ROOT = Path(__file__).parents[3]
CONTAINERFILES = sorted((ROOT / "images").glob("*/Containerfile"))
LOCKS = sorted((ROOT / "images").rglob("*.lock"))
ONE = "sha256:" + "1" * 64
TWO = "sha256:" + "2" * 64


def _pinned(lock: Path) -> set[str]:
    return set(re.findall(r"^[a-z0-9._-]+==[^ ;\\]+", lock.read_text(), re.MULTILINE))


def test_an_image_has_the_version_as_its_tag() -> None:
    assert Images().of("evaluate") == f"localhost/srccore/evaluate:{srccore.__version__}"
    assert Images("r.example.com/a/", "7").of("report") == "r.example.com/a/srccore/report:7"


def test_a_digest_replaces_the_tag_and_none_may_be_missing() -> None:
    images = Images("r.example.com", digests={"evaluate": ONE})
    assert images.of("evaluate") == f"r.example.com/srccore/evaluate@{ONE}"
    with pytest.raises(UserError, match=r"no digest for the image r\.example\.com/srccore/report"):
        images.of("report")


def test_a_list_of_digests_serves_a_mirror_of_its_registry(tmp_path: Path) -> None:
    path = tmp_path / "images.txt"
    path.write_text(
        f"# 0.1.0\nhere/srccore/evaluate@{ONE}\n\n127.0.0.1:5000/srccore/report@{TWO}\n"
    )
    digests = read_digests(path, "mirror.example.com")
    assert digests == {"evaluate": ONE, "report": TWO}
    assert Images("mirror", digests=digests).of("report") == f"mirror/srccore/report@{TWO}"


@pytest.mark.parametrize(
    "line", ["here/srccore/evaluate:0.1.0", f"here/srccore/evaluat@{ONE}", f"evaluate@{ONE}0"]
)
def test_a_line_that_is_no_image_with_its_digest_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "images.txt"
    path.write_text(f"here/srccore/report@{TWO}\n{line}\n")
    with pytest.raises(UserError, match=r"Line 2 of .*images\.txt"):
        read_digests(path, "here")


def test_a_list_that_is_not_there_is_told_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="srccore images push --registry here"):
        read_digests(tmp_path / "images.txt", "here")


def test_the_command_lists_every_image(tmp_path: Path) -> None:
    tagged = CliRunner().invoke(app, ["list", "--registry", "r.example.com"])
    assert tagged.stdout.splitlines() == [Images("r.example.com").of(name) for name in IMAGES]
    path = tmp_path / "images.txt"
    path.write_text("".join(f"here/srccore/{name}@{ONE}\n" for name in IMAGES))
    listed = CliRunner().invoke(app, ["list", "--registry", "there", "--digests", str(path)])
    assert listed.stdout.splitlines() == [f"there/srccore/{name}@{ONE}" for name in IMAGES]


def test_every_base_is_used_and_has_what_makes_it() -> None:
    assert {path.parent.name for path in CONTAINERFILES} == {"base", "stage"}
    assert set(IMAGES.values()) == set(BASES)
    for base in BASES:
        files = {path.name for path in (ROOT / "images" / base).iterdir()}
        assert files == {"requirements.lock", "finish.sh"}


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.parent.name)
def test_a_containerfile_takes_its_base_as_an_argument_and_has_no_entrypoint(path: Path) -> None:
    text = path.read_text()
    assert re.findall(r"^FROM (.*)$", text, re.MULTILINE) in (["${BASE_IMAGE}"], ["${BASE}"])
    assert "ENTRYPOINT" not in text
    if path.parent.name == "stage":
        # A cluster that forbids root refuses a name instead of a number.
        assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["1000:1000"]


def test_an_image_finds_the_driver_that_a_cluster_mounts() -> None:
    settings = re.findall(
        r"^ENV (.*)$", (ROOT / "images/base/Containerfile").read_text(), re.MULTILINE
    )[-1].split()
    assert settings == [
        "LD_LIBRARY_PATH=/usr/local/nvidia/lib64",
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    ]
    # An image on the base must not replace them.
    assert not re.search("LD_LIBRARY|NVIDIA", (ROOT / "images/stage/Containerfile").read_text())


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_lock_file_has_hashes_for_all_and_the_address_of_none(lock: Path) -> None:
    text = lock.read_text()
    assert "://" not in text
    assert "--index-url" not in text
    requirements = re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:]
    assert requirements
    assert all("--hash=sha256:" in requirement for requirement in requirements)


@pytest.mark.parametrize("name", [*(f"{base}/requirements" for base in BASES), "executor"])
def test_an_image_has_the_versions_that_were_tested_together(name: str) -> None:
    pinned = _pinned(ROOT / "images" / f"{name}.lock")
    assert pinned
    if name.startswith("vllm"):
        # Another build than the one for GPUs is tested, on the same versions of these.
        pinned = {each for each in pinned if re.match(r"(torch|torchvision|transformers)==", each)}
        assert len(pinned) == 3
        assert pinned <= _pinned(ROOT / "tests/vllm/requirements.lock")
    else:
        assert pinned <= _pinned(ROOT / "requirements.lock")


def test_an_image_that_watches_a_job_has_neither_torch_nor_what_reads_data_sets() -> None:
    pinned = {
        each.partition("==")[0] for each in _pinned(ROOT / "images/launcher/requirements.lock")
    }
    assert {"kubernetes", "boto3", "pydantic", "pyyaml"} <= pinned
    assert not {"torch", "transformers", "pyarrow", "pillow", "openai"} & pinned
