"""Constructs of kfp 2.17 that compile but fail later, silently or only on a backend.

Each of them was seen to fail; `unsafe` finds them in a compiled pipeline.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Ir = dict[str, Any]

PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['(?P<name>[^']+)'\]\}\}")
ITEM = "pipelinechannel--loop-item-param-"


def unsafe(ir: Ir) -> list[str]:
    """Lists what is unsafe in a compiled pipeline; empty if nothing is."""
    return sorted({problem for check in CHECKS for problem in check(ir)})


def dags(ir: Ir) -> Iterator[tuple[str, Ir]]:
    """Components that are DAGs, by name; the pipeline itself is ``root``."""
    for name, component in {"root": ir["root"], **ir["components"]}.items():
        if "dag" in component:
            yield name, component


def _tasks(ir: Ir) -> Iterator[tuple[str, Ir, str, Ir]]:
    for name, component in dags(ir):
        for task, spec in component["dag"]["tasks"].items():
            yield name, component, task, spec


def _is_loop(task: Ir) -> bool:
    return "parameterIterator" in task or "artifactIterator" in task


def _loop_bodies(ir: Ir) -> dict[str, Ir]:
    names = {task["componentRef"]["name"] for _, _, _, task in _tasks(ir) if _is_loop(task)}
    return {name: ir["components"][name] for name in names}


def _inside(ir: Ir, component: Ir) -> Iterator[tuple[str, Ir]]:
    """All tasks below a DAG."""
    for name, task in component.get("dag", {"tasks": {}})["tasks"].items():
        yield name, task
        yield from _inside(ir, ir["components"][task["componentRef"]["name"]])


def outside_parameter(ir: Ir) -> Iterator[str]:
    """When run locally, the loop item would replace it."""
    for _, _, task, spec in _tasks(ir):
        items = spec.get("parameterIterator", {}).get("items", {}).get("inputParameter")
        for name, value in spec.get("inputs", {}).get("parameters", {}).items():
            if _is_loop(spec) and name != items and "taskOutputParameter" in value:
                yield f"{task}: another task's output parameter inside a loop: {name}"


def ignored_item(ir: Ir) -> Iterator[str]:
    """No dependency is emitted."""
    for name, body in _loop_bodies(ir).items():
        used = str([task.get("inputs") for task in body["dag"]["tasks"].values()])
        if ITEM not in used and "-loop-item" not in used:
            yield f"{name}: the loop body ignores its item"


def artifact_loop(ir: Ir) -> Iterator[str]:
    for _, _, task, spec in _tasks(ir):
        if "artifactIterator" in spec:
            yield f"{task}: ParallelFor over artifacts"


def nested_collected(ir: Ir) -> Iterator[str]:
    for name, body in _loop_bodies(ir).items():
        for output in body["dag"].get("outputs", {}).get("artifacts", {}).values():
            for selector in output.get("artifactSelectors", []):
                if _is_loop(body["dag"]["tasks"][selector["producerSubtask"]]):
                    yield f"{name}: nested Collected"


def named_items(ir: Ir) -> Iterator[str]:
    for _, _, task, spec in _tasks(ir):
        items = spec.get("parameterIterator", {}).get("items", {}).get("inputParameter")
        source = spec.get("inputs", {}).get("parameters", {}).get(items, {})
        key = source.get("taskOutputParameter", {}).get("outputParameterKey", "Output")
        if key != "Output":
            yield f"{task}: loop items from a named output"


def one_of(ir: Ir) -> Iterator[str]:
    for name, component in dags(ir):
        for output in component["dag"].get("outputs", {}).get("artifacts", {}).values():
            if len(output.get("artifactSelectors", [])) > 1:
                yield f"{name}: OneOf of artifacts"


def exit_handler(ir: Ir) -> Iterator[str]:
    for name, component in dags(ir):
        if name.startswith("comp-exit-handler") and any(
            _is_loop(task) for _, task in _inside(ir, component)
        ):
            yield f"{name}: an ExitHandler round a loop"


def optional_parameter(ir: Ir) -> Iterator[str]:
    for name, component in {"root": ir["root"], **ir["components"]}.items():
        parameters = component.get("inputDefinitions", {}).get("parameters", {})
        for key, spec in parameters.items():
            if spec.get("isOptional") and "defaultValue" not in spec:
                yield f"{name}: an optional parameter without a default: {key}"


def optional_artifact(ir: Ir) -> Iterator[str]:
    """kfp.local fails if it is not set."""
    for name, component in dags(ir):
        artifacts = component.get("inputDefinitions", {}).get("artifacts", {})
        if any(spec.get("isOptional") for spec in artifacts.values()):
            yield f"{name}: a sub-DAG with an optional artifact"


def resources(ir: Ir) -> Iterator[str]:
    """A dangling input inside a loop; a dropped limit if the parameter is not a string."""
    in_loops = {
        task["componentRef"]["name"]
        for body in _loop_bodies(ir).values()
        for _, task in _inside(ir, body)
    }
    executors = ir["deploymentSpec"]["executors"]
    for _, component, task, spec in _tasks(ir):
        name = spec["componentRef"]["name"]
        label = ir["components"][name].get("executorLabel")
        if label is None:
            continue
        for found in PLACEHOLDER.finditer(str(executors[label]["container"].get("resources", ""))):
            if name in in_loops:
                yield f"{task}: a resource from a parameter inside a loop"
            given = spec["inputs"]["parameters"][found["name"]].get("componentInputParameter")
            parameters = component.get("inputDefinitions", {}).get("parameters", {})
            if given in parameters and parameters[given]["parameterType"] != "STRING":
                yield f"{task}: a resource from a parameter that is not a string"


def dangling_input(ir: Ir) -> Iterator[str]:
    for name, component, task, spec in _tasks(ir):
        known = component.get("inputDefinitions", {})
        for kind, field in (("parameters", "Parameter"), ("artifacts", "Artifact")):
            for value in spec.get("inputs", {}).get(kind, {}).values():
                given = value.get(f"componentInput{field}")
                if given and given not in known.get(kind, {}):
                    yield f"{task} of {name}: a dangling input: {given}"


def artifacts_only(ir: Ir) -> Iterator[str]:
    for name, component in dags(ir):
        inputs = component.get("inputDefinitions", {})
        if name != "root" and inputs.get("artifacts") and not inputs.get("parameters"):
            yield f"{name}: a sub-DAG with only artifact inputs"


def iteration_name(ir: Ir) -> Iterator[str]:
    """kfp.local takes it for a loop index."""
    for _, _, task, _ in _tasks(ir):
        if "-iteration-" in task:
            yield f"{task}: a task called *-iteration-*"


CHECKS = (
    outside_parameter,
    ignored_item,
    artifact_loop,
    nested_collected,
    named_items,
    one_of,
    exit_handler,
    optional_parameter,
    optional_artifact,
    resources,
    dangling_input,
    artifacts_only,
    iteration_name,
)
