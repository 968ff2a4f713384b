"""Writes what is generated and committed: compiled pipelines, component.yaml files, their pages.

``make compiled`` runs it; a test compares what is committed with what it would write.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from srccore import components
from srccore.config import load_config, preset_names
from srccore.containers.names import LAUNCH_TRAINING, Images
from srccore.pipelines.compiling import compile_pipeline
from srccore.pipelines.profile import Profile, Resources, load_profile
from srccore.stages.table import STAGES, Input

__all__ = ["ROOT", "generated"]

ROOT = Path(__file__).resolve().parents[1]
SHARDS = {"tiny": 2}
"""Shards of a shipped pipeline, where the preset's one shard would show no fan-out."""

_VALUES = {
    "artifact_root": "artifact_root",
    "round_number": "1",
    "uri": '"s3://bucket/my-candidates"',
    "name": '"my run"',
    "seed": "0",
    "shards": "1",
}
"""Of a component's other parameters, in the example of its page."""
_JOB = """\
With `launcher` `pytorchjob` or `trainjob` the task's pod creates a job, watches it and shows its
log. It needs no GPU and 512Mi of memory, runs the image `launch-training`, and does so as an
account that may create such jobs. The job's pods read the inputs from the bucket and write to
`artifact_root`, which must be one, so an input is the output of a component of the suite or of
`import-output`, not the thing itself. They get nothing from the task: what they need, Secrets
included, is in `job`. Its fields are those of `srccore.cluster.request.JobSettings`.

```python
CALL
    launcher="pytorchjob",
    job={
        "image": "IMAGE",
        "pods": 2,
        "cpu": "8",
        "memory": "64Gi",
        "gpus": 1,
        "shared_memory": "8Gi",
        "secrets": [{"name": "s3-credentials", "keys": {"access-key": "AWS_ACCESS_KEY_ID",
                                                        "secret-key": "AWS_SECRET_ACCESS_KEY"}}],
    },
)
task.set_container_image("LAUNCHING")
```"""
"""How a training stage runs as a job, on its component's page."""


def generated() -> Iterator[tuple[Path, str]]:
    """All generated files.

    Yields:
        A path below the repository's root, and the text that belongs there.
    """
    for stage in STAGES:
        name = STAGES[stage].python_name
        folder, component = Path("components") / name, getattr(components, name)
        yield folder / "component.yaml", _compiled(component)
        yield folder / "README.md", _page(stage, component)
    for preset in preset_names():
        config = load_config(preset)
        profile = load_profile(None, config, shards=SHARDS.get(preset))
        text = compile_pipeline(config, profile, Images())
        yield Path("pipelines/compiled") / f"{preset}.yaml", text


def _compiled(component: Any) -> str:
    from kfp import compiler

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "component.yaml"
        compiler.Compiler().compile(component, str(path))
        return path.read_text(encoding="utf-8")


def _page(stage: str, component: Any) -> str:
    from docstring_parser import parse

    written = (inspect.getdoc(component.python_func) or "").replace("``", "`")
    documentation = parse(written)
    described = {
        each.arg_name: " ".join((each.description or "").split()) for each in documentation.params
    }
    spec = component.component_spec
    inputs, outputs = spec.inputs or {}, spec.outputs or {}
    purpose = [documentation.short_description, documentation.long_description]
    parts = [
        f"# {stage}",
        *(text for text in purpose if text),
        "## Inputs",
        "\n".join(["| name | type | |", "|---|---|---|", *_rows(inputs, described)]),
        "## Outputs",
        "\n".join(["| name | type | |", "|---|---|---|", *_rows(outputs, described)]),
        "## Resources",
        _resources(stage),
        "## In another pipeline",
        f"```python\n{_example(stage, inputs)}\n```",
        *(["## As a job", _as_job(stage, inputs)] if STAGES[stage].trains else ()),
        "How to load it by file, and how to bring what you have already: "
        "[reuse of components](../../docs/components.md).",
    ]
    return "\n\n".join(parts) + "\n"


def _rows(specs: Mapping[str, Any], described: Mapping[str, str]) -> Iterator[str]:
    for name, spec in specs.items():
        kind = spec.type.partition("@")[0].removeprefix("system.")
        if getattr(spec, "is_artifact_list", False):
            kind = f"list of {kind}"
        given = ""
        if getattr(spec, "optional", False):
            default = getattr(spec, "default", None)
            given = " Optional." if default is None else f" Default `{default!r}`."
        text = described[name].removeprefix("Output. ")
        yield f"| `{name}` | {kind} | {text}{given} |"


def _resources(stage: str) -> str:
    resources: Resources = Profile().resources(stage)
    gpus = f", {resources.gpus} GPU" if resources.gpus else ""
    memory = f", {resources.shared_memory} of shared memory" if resources.shared_memory else ""
    return (
        f"Image `{Images().of(stage)}`, on the base `{STAGES[stage].base}`. The shipped pipeline "
        f"requests {resources.cpu} CPU, {resources.memory} of memory{gpus}{memory}, and times out "
        f"after {resources.timeout_hours:g} hours; in your own pipeline, set what you need on the "
        "task."
    )


def _example(stage: str, inputs: Mapping[str, Any]) -> str:
    name = STAGES[stage].python_name
    return f"from srccore.components import {name}\n\n{_call(stage, inputs, _VALUES)}\n)"


def _as_job(stage: str, inputs: Mapping[str, Any]) -> str:
    images = Images("registry.example.com/team")
    call = _call(stage, inputs, {**_VALUES, "artifact_root": '"s3://bucket/src"'})
    text = _JOB.replace("CALL", call).replace("IMAGE", images.of(stage))
    return text.replace("LAUNCHING", images.of(LAUNCH_TRAINING))


def _call(stage: str, inputs: Mapping[str, Any], values: Mapping[str, str]) -> str:
    """The call of a component with all that it requires, up to its closing bracket."""
    entry = STAGES[stage]
    read = {each.name: each for each in entry.inputs}
    lines = [f"task = {entry.python_name}("]
    for key, spec in inputs.items():
        if getattr(spec, "optional", False):
            continue
        if key in read:
            value = _output(read[key])
        elif spec.type == "Dict":
            value = f'preset["{entry.sections.get(key, key)}"]'
        else:
            value = values[key]
        lines.append(f"    {key}={value},")
    return "\n".join(lines)


def _output(read: Input) -> str:
    task = f"{STAGES[read.made_by].python_name}_task"
    output = f'{task}.outputs["{read.output or read.name}"]'
    return f"dsl.Collected({output})" if read.many else output


if __name__ == "__main__":
    for file, content in generated():
        (ROOT / file).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / file).write_text(content, encoding="utf-8")
        print(file)
