"""A release: an sdist and a wheel, each installed into an empty environment."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UV = Path(sys.executable).parent / "uv"
LOAD = """
from importlib.resources import files
from kfp.components import load_component_from_file
from srccore.components import search_candidates
from srccore.kubeflow.package import read_package

folder = files("srccore.components.search_candidates")
loaded = load_component_from_file(str(folder / "component.yaml"))
assert loaded.component_spec.inputs.keys() == search_candidates.component_spec.inputs.keys()
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([UV, "build", "--quiet", "--out-dir", out, ROOT], check=True)
    return out


def test_a_wheel_holds_every_file_of_the_three_folders_and_no_other(release: Path) -> None:
    listed = ["git", "-C", ROOT, "ls-files", "-z", "srccore", "components", "pipelines"]
    files = subprocess.run(listed, check=True, stdout=subprocess.PIPE, text=True).stdout
    tracked = {name for name in files.split("\0") if (ROOT / name).is_file()}
    (wheel,) = release.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {
        name if name.startswith("srccore/") else f"srccore/{name}" for name in tracked
    }


@pytest.mark.parametrize("form", ["*.whl", "*.tar.gz"])
def test_a_release_compiles_a_pipeline_and_loads_a_component(
    release: Path, form: str, tmp_path: Path
) -> None:
    (file,) = release.glob(form)
    environment = tmp_path / "environment"
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, environment], check=True)
    python = environment / "bin" / "python"
    install = [UV, "pip", "install", "--quiet", "--python", python]
    constraints = ["--constraints", ROOT / "requirements.lock"]
    subprocess.run([*install, *constraints, f"srccore[pipelines] @ file://{file}"], check=True)

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        return done.stdout

    srccore = environment / "bin" / "srccore"
    assert "compile" in run(srccore, "--help")
    run(srccore, "compile", "--preset", "tiny", "-o", "src.yaml")
    shipped = (ROOT / "pipelines" / "compiled" / "tiny.yaml").read_text(encoding="utf-8")
    assert len((tmp_path / "src.yaml").read_text(encoding="utf-8")) > len(shipped) / 2
    run(python, "-c", LOAD)
