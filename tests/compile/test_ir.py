"""Every check of `ir` finds its construct in a pipeline that kfp compiled."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, List, NamedTuple, Optional

import pytest
import yaml
from ir import unsafe
from kfp import compiler, dsl
from kfp.dsl import Artifact, Dataset, Input, Output
from shallow import shallow

component = functools.partial(dsl.component, base_image="localhost/none:1")


@component
def count() -> List[int]:
    return [0, 1]


@component
def number() -> int:
    return 1


@component
def named() -> NamedTuple("Named", [("items", List[int])]):
    return ([0],)


@component
def make(out: Output[Dataset], value: int = 0, memory: str = "") -> None:
    pass


@component
def read(found: Input[Dataset], value: int = 0) -> None:
    pass


@component
def read_all(found: Input[List[Dataset]]) -> None:
    pass


@component
def maybe(value: Optional[int] = None) -> None:
    pass


@component
def clean() -> None:
    pass


def outside_parameter() -> None:
    other = number()
    with dsl.ParallelFor([0, 1]) as item:
        make(value=item)
        make(value=other.output)


def ignored_item() -> None:
    with dsl.ParallelFor(count().output):
        make()


@dsl.pipeline
def loop_over_artifacts(found: Input[List[Dataset]], value: int) -> None:
    with dsl.ParallelFor(found) as each:
        read(found=each, value=value)


def artifact_loop() -> None:
    with dsl.ParallelFor([0, 1]) as item:
        made = make(value=item)
    loop_over_artifacts(found=dsl.Collected(made.outputs["out"]), value=1)


def named_items() -> None:
    with dsl.ParallelFor(named().outputs["items"]) as item:
        make(value=item)


def one_of() -> Dataset:
    with dsl.If(number().output == 1):
        first = make()
    with dsl.Else():
        second = make()
    return dsl.OneOf(first.outputs["out"], second.outputs["out"])


def exit_handler() -> None:
    with dsl.ExitHandler(clean()), dsl.ParallelFor([0, 1]) as item:
        make(value=item)


def optional_parameter() -> None:
    maybe()


def resources_in_a_loop(memory: str = "1Gi") -> None:
    with dsl.ParallelFor([0, 1]) as item:
        make(value=item).set_memory_limit(memory)


def resources_of_no_string(gpus: int = 1) -> None:
    make().set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(gpus)


@dsl.pipeline
def only_artifacts(found: Input[Dataset]) -> None:
    read(found=found)


def artifacts_only() -> None:
    only_artifacts(found=make().outputs["out"])


@dsl.pipeline
def an_optional_artifact(
    found: Input[Dataset], value: int, more: Optional[Input[Dataset]] = None
) -> None:
    read(found=found, value=value)


def optional_artifact() -> None:
    an_optional_artifact(found=make().outputs["out"], value=1)


@dsl.pipeline
def round_iteration_one(value: int) -> None:
    make(value=value)


def iteration_name() -> None:
    round_iteration_one(value=1)


BAD: list[tuple[Callable[..., Any], str]] = [
    (outside_parameter, "another task's output parameter inside a loop"),
    (ignored_item, "the loop body ignores its item"),
    (artifact_loop, "ParallelFor over artifacts"),
    (named_items, "loop items from a named output"),
    (one_of, "OneOf of artifacts"),
    (exit_handler, "an ExitHandler round a loop"),
    (optional_parameter, "an optional parameter without a default"),
    (resources_in_a_loop, "a resource from a parameter inside a loop"),
    (resources_in_a_loop, "a dangling input"),
    (resources_of_no_string, "a resource from a parameter that is not a string"),
    (artifacts_only, "a sub-DAG with only artifact inputs"),
    (optional_artifact, "a sub-DAG with an optional artifact"),
    (iteration_name, "a task called *-iteration-*"),
]


def compiled(function: Callable[..., Any], folder: Path) -> dict[str, Any]:
    path = folder / "pipeline.yaml"
    shallow(lambda: compiler.Compiler().compile(dsl.pipeline(function), str(path)))
    found: dict[str, Any] = next(yaml.safe_load_all(path.read_text()))
    return found


@pytest.mark.parametrize(("function", "problem"), BAD, ids=[problem for _, problem in BAD])
def test_an_unsafe_construct_is_found(
    function: Callable[..., Any], problem: str, tmp_path: Path
) -> None:
    found = unsafe(compiled(function, tmp_path))
    assert any(problem in each for each in found), found


def fine(seed: int = 0) -> None:
    with dsl.ParallelFor([0, 1]) as item:
        made = make(value=item)
    read_all(found=dsl.Collected(made.outputs["out"]))
    read(found=make(value=seed).outputs["out"])


def test_a_plain_fan_out_is_fine(tmp_path: Path) -> None:
    assert unsafe(compiled(fine, tmp_path)) == []


def test_nested_collected_is_refused_or_found(tmp_path: Path) -> None:
    @component
    def take(found: Input[List[Artifact]]) -> None:
        pass

    def nested() -> None:
        with dsl.ParallelFor([0, 1]) as outer:
            with dsl.ParallelFor([0, 1]) as inner:
                made = make(value=inner)
            make(value=outer)
        take(found=dsl.Collected(made.outputs["out"]))

    found = unsafe(compiled(nested, tmp_path))
    assert any("nested Collected" in each for each in found), found
