"""The committed generated files are up to date (`make compiled`)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from shallow import shallow

import srccore.components
from srccore.cluster.request import JobSettings
from srccore.containers.names import Images
from srccore.pipelines.regenerate import ROOT, generated
from srccore.stages.table import STAGES

TRAINING = [name for name, stage in STAGES.items() if stage.trains]
FOLDERS = [stage.replace("-", "_") for stage in STAGES]


def documents(text: str) -> list[Any]:
    return list(yaml.load_all(text, yaml.CSafeLoader))


def test_generated_files_are_current() -> None:
    stale = []
    for path, text in shallow(lambda: list(generated())):
        found = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).exists() else ""
        # kfp writes the comments at the top of a YAML file in no fixed order.
        read = documents if path.suffix == ".yaml" else str
        if read(found) != read(text):
            stale.append(str(path))
    assert not stale, f"run make compiled: {', '.join(stale)}"


def test_every_stage_is_a_component_with_its_page() -> None:
    found = {path.parent.name for path in (ROOT / "components").glob("*/component.py")}
    assert found == set(FOLDERS)


@pytest.mark.parametrize("stage", STAGES)
def test_a_component_file_loads_and_names_its_image(stage: str) -> None:
    from kfp import components

    path = ROOT / "components" / stage.replace("-", "_") / "component.yaml"
    assert components.load_component_from_file(str(path)).name == stage
    spec = next(yaml.safe_load_all(path.read_text()))
    (executor,) = spec["deploymentSpec"]["executors"].values()
    assert executor["container"]["image"] == Images().of(stage)
    assert "pip install" not in str(executor)


@pytest.mark.parametrize("stage", STAGES)
def test_a_component_reads_artifacts_as_a_backend_names_them(stage: str, tmp_path: Path) -> None:
    from kfp.dsl import executor

    component = getattr(srccore.components, stage.replace("-", "_"))
    # Unlike kfp's local runner, a real backend sends no schemaTitle: the annotation must suffice.
    artifact = {"name": "3", "uri": str(tmp_path), "type": {"instanceSchema": ""}, "metadata": {}}
    inputs = [k for k, v in component.component_spec.inputs.items() if "@" in v.type]
    made = executor.Executor(
        {
            "inputs": {"artifacts": {name: {"artifacts": [artifact]} for name in inputs}},
            "outputs": {"outputFile": str(tmp_path / "outputs.json")},
        },
        component,
    )
    for name in inputs:
        found = made.input_artifacts[name]
        for each in found if isinstance(found, list) else [found]:
            assert each.path == str(tmp_path)


def test_importing_the_components_needs_kfp_and_no_heavy_package() -> None:
    code = (
        "import sys, srccore.components\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy', 'boto3'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", sorted((ROOT / "components").glob("*/component.py")), ids=str)
def test_a_body_is_ten_statements_at_most_and_calls_the_library(path: Path) -> None:
    (function,) = (n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef))
    assert "from srccore." in ast.unparse(function)
    assert len(function.body) <= 10


@pytest.mark.parametrize("stage", TRAINING)
def test_the_job_on_the_page_of_a_training_stage_is_one(stage: str) -> None:
    page = (ROOT / "components" / stage.replace("-", "_") / "README.md").read_text()
    example = ast.parse(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[-1])
    (job,) = (node.value for node in ast.walk(example) if getattr(node, "arg", "") == "job")
    assert JobSettings.model_validate(ast.literal_eval(job)).image == Images(
        "registry.example.com/team"
    ).of(stage)
