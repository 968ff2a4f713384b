"""The table of stages says the same as the stage functions and the components."""

from __future__ import annotations

import inspect
from typing import get_type_hints

import pytest

import srccore.components
from srccore.cluster.request import INPROCESS, LAUNCHERS
from srccore.config import RunConfig
from srccore.stages.table import STAGES, Stage
from srccore.training.machine import Machine

WITH_FUNCTION = [stage for stage in STAGES.values() if stage.module]
COMPUTE = {"device", "threads"}
JOB = {
    *("round_number", "launcher", "job"),
    *("node_selector", "tolerations", "training_memory", "training_gpus"),
}
"""What a stage that trains needs to know of the job that does."""


def ids(stage: Stage) -> str:
    return stage.name


@pytest.mark.parametrize("stage", WITH_FUNCTION, ids=ids)
def test_a_stage_function_takes_what_the_table_says(stage: Stage) -> None:
    parameters = inspect.signature(stage.function()).parameters
    inputs = {each.name for each in stage.inputs}
    assert parameters.keys() == inputs | {*stage.sections, *stage.settings, "out", "machine"}
    for each in stage.inputs:
        assert (parameters[each.name].default is None) == each.optional, each.name
    assert get_type_hints(stage.function())["machine"] is Machine


@pytest.mark.parametrize("stage", WITH_FUNCTION, ids=ids)
def test_the_sections_of_the_table_are_those_that_the_function_takes(stage: Stage) -> None:
    hints = get_type_hints(stage.function())
    for name, section in stage.sections.items():
        assert RunConfig.model_fields[section].annotation is hints[name], name


@pytest.mark.parametrize("stage", WITH_FUNCTION, ids=ids)
def test_a_component_takes_and_gives_what_the_table_says(stage: Stage) -> None:
    spec = getattr(srccore.components, stage.python_name).component_spec
    inputs = {each.name for each in stage.inputs}
    wanted = inputs | {*stage.sections, *stage.settings, "artifact_root"}
    if stage.base == "models":
        wanted |= COMPUTE
    if "shard" in stage.settings:
        wanted |= {"shards"}
    if stage.trains:
        wanted |= JOB
    if stage.name == "prepare-data":
        wanted |= {"version"}
    assert spec.inputs.keys() == wanted
    for each in stage.inputs:
        assert spec.inputs[each.name].is_artifact_list == each.many, each.name
        assert spec.inputs[each.name].optional == each.optional, each.name
    assert spec.outputs.keys() - {"metrics"} == set(stage.outputs)


def test_stages_that_train_describe_their_jobs_in_the_same_words() -> None:
    training = [stage for stage in STAGES.values() if stage.trains]
    first, *others = (
        {name: component.component_spec.inputs[name].description for name in JOB}
        for component in (getattr(srccore.components, stage.python_name) for stage in training)
    )
    assert others == [first] * 2
    assert all(f"``{name}``" in first["launcher"] for name in (INPROCESS, *LAUNCHERS))


def test_an_input_comes_from_an_output_that_exists() -> None:
    for stage in STAGES.values():
        for each in stage.inputs:
            assert (each.output or each.name) in STAGES[each.made_by].outputs, (stage.name, each)


def test_stages_that_may_ask_a_teacher_name_its_section() -> None:
    asking = {stage.name for stage in STAGES.values() if stage.teacher}
    with_endpoint = {
        stage.name
        for stage in WITH_FUNCTION
        if "endpoint" in RunConfig.model_fields[stage.sections["config"]].annotation.model_fields
    }
    assert asking == with_endpoint
