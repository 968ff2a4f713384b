"""The tree of a run's tasks: the pipeline says what there is, the backend how far it has come.

Pure. The backend lists the nodes of the workflow that carries a run out, flat, and leaves
``parent_task_id``, ``pod_name`` and ``error`` empty (read in the sources of 2.15 to 2.17, seen in
2.17; a task called ``evaluate`` occurs once a round). Some entries have not even a name. What it
does give is ``child_tasks``, whose ``pod_name`` is the id of the next node: the workflow's name and
a hash of the node's full path (Argo's ``Workflow.NodeID``). The paths follow from the pipeline:

    round-2                    a nested pipeline: its tasks lie under <path>.round-2
    round-2.evaluate           a task: its pod is <path>.evaluate.executor
    round-2.loop               a loop: item 3 is <path>.loop.iteration-iterations(3:3)

and before each of them stands a node with ``-driver`` at its end. Where a template has a retry
strategy, as every one has by the defaults of 2.17's install, <path> is the node of all attempts,
and what lies under it lies under <path>(0), under <path>(1) once that was tried, and so on: at
the root, too, whose path is the workflow's name. So a task is the node of its name with a child
whose id is the hash of a path under the task's own. Where the run names no pipeline (one of an
uploaded version that was deleted since), the tree is that of ``parent_task_id``.
"""

from __future__ import annotations

import graphlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count, islice, takewhile
from typing import Any

__all__ = ["DONE", "Task", "failures", "last_told", "node_id", "task_tree", "walk"]

DONE = frozenset({"SUCCEEDED", "SKIPPED"})
DRIVER = "-driver"
POD = "executor"
USUAL_DELAY = timedelta(minutes=2)
"""Within which the backend lists what has happened; its agent looks every half a minute."""


@dataclass(frozen=True)
class Task:
    """A task of a run, or a nested pipeline, or a loop.

    Args:
        name: As the pipeline displays it.
        state: One of the API's states; ``PENDING`` until the backend knows it.
        started: When it began.
        finished: When it ended.
        error: What the backend says of its failure.
        children: What it consists of.
    """

    name: str
    state: str = "PENDING"
    started: datetime | None = None
    finished: datetime | None = None
    error: str | None = None
    children: tuple[Task, ...] = ()


class _Nodes:
    """The nodes that the backend lists, to be found by path."""

    def __init__(self, details: Sequence[Any]) -> None:
        self.ids = frozenset(each for detail in details for each in _children(detail))
        # An id is the workflow's name and a hash.
        self.workflow = min(self.ids, default="").rpartition("-")[0]
        self.by_name: dict[str, list[Any]] = defaultdict(list)
        for detail in details:
            self.by_name[detail.display_name].append(detail)

    def holds(self, path: str) -> bool:
        """Whether there is a node of this path."""
        return node_id(self.workflow, path) in self.ids

    def inside(self, path: str) -> str:
        """What the paths of the nodes under a path begin with: the path, or its last attempt."""
        attempts = takewhile(self.holds, (f"{path}({number})" for number in count()))
        *_, last = path, *attempts
        return last

    def find(self, path: str, inner: Sequence[str]) -> Any | None:
        """The node of a path, known by its first attempt or a name that it begins with inside."""
        wanted = {node_id(self.workflow, f"{path}.{name}") for name in inner}
        wanted.add(node_id(self.workflow, f"{path}(0)"))
        alike = self.by_name.get(path.rpartition(".")[2], [])
        return next((each for each in alike if wanted & set(_children(each))), None)


def node_id(workflow: str, path: str) -> str:
    """The id that Argo gives to a node: the workflow's name and the FNV-1a hash of the path.

    Args:
        workflow: The workflow's name.
        path: The node's full path, which begins with that name.
    """
    value = 0x811C9DC5
    for byte in path.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return f"{workflow}-{value}"


def task_tree(run: Any) -> tuple[Task, ...]:
    """The tasks of a run.

    Args:
        run: A ``V2beta1Run``, as the API gives a single one.

    Returns:
        The tasks of the pipeline's root in the order in which they can run.
    """
    details = _named(run)
    pipeline = run.pipeline_spec or {}
    pipeline = pipeline.get("pipeline_spec", pipeline)
    nodes = _Nodes(details)
    root = f"{nodes.inside(nodes.workflow)}.root"
    is_ours = not details or nodes.holds(f"{root}{DRIVER}")
    if "root" in pipeline and is_ours:
        return _tasks(pipeline, pipeline["root"]["dag"], root, nodes)
    return _listed(details)


def walk(tasks: Sequence[Task], above: str = "") -> Iterator[tuple[str, Task]]:
    """All tasks that have no others inside, each with its name from the root on."""
    for task in tasks:
        name = f"{above}{task.name}"
        if task.children:
            yield from walk(task.children, f"{name} / ")
        else:
            yield name, task


def failures(run: Any) -> list[tuple[str, str | None]]:
    """Names of the tasks that failed, and what the backend says of each."""
    tasks = [(name, task.error) for name, task in walk(task_tree(run)) if task.state == "FAILED"]
    # A driver is no task, yet its failure is one: its task never begins.
    drivers = [
        (each.display_name, _error(each))
        for each in _named(run)
        if each.state == "FAILED" and each.display_name.endswith(DRIVER)
    ]
    return tasks + drivers


def last_told(run: Any) -> datetime | None:
    """When the backend last told of a run's tasks, if it has ceased to.

    Argo compresses the nodes of a workflow that has grown beyond 1 MiB, and Kubeflow does not read
    them then (seen in 2.17). What it still lists is executions, without names.

    Args:
        run: A ``V2beta1Run``, as the API gives a single one.

    Returns:
        The last time that a named entry knows; None where tasks are told of as usual.
    """
    times: dict[bool, list[datetime]] = {True: [], False: []}
    for each in _details(run):
        known = (moment(each.start_time), moment(each.end_time))
        times[bool(each.display_name)] += [time for time in known if time is not None]
    if not times[True] or not times[False]:
        return None
    last = max(times[True])
    return last if max(times[False]) - last > USUAL_DELAY else None


def _tasks(
    pipeline: Mapping[str, Any], dag: Mapping[str, Any], path: str, nodes: _Nodes
) -> tuple[Task, ...]:
    inside = nodes.inside(path)
    order = graphlib.TopologicalSorter(
        {key: sorted(dag["tasks"][key].get("dependentTasks", ())) for key in sorted(dag["tasks"])}
    )
    return tuple(
        _task(pipeline, dag["tasks"][key], f"{inside}.{key}", nodes) for key in order.static_order()
    )


def _task(pipeline: Mapping[str, Any], spec: Mapping[str, Any], path: str, nodes: _Nodes) -> Task:
    name = spec.get("taskInfo", {}).get("name") or path.rpartition(".")[2]
    if "parameterIterator" not in spec:
        return _single(pipeline, spec, name, path, nodes)
    children = tuple(
        _single(pipeline, spec, f"item {index}", f"{nodes.inside(item)}.iteration-item", nodes)
        for index, item in enumerate(_items(spec["parameterIterator"]["items"], path, nodes))
    )
    return _made(name, nodes.find(path, [f"iteration{DRIVER}"]), children)


def _items(items: Mapping[str, Any], path: str, nodes: _Nodes) -> Iterator[str]:
    """Paths of a loop's items: all where the pipeline lists them, else those that there are."""
    inside = nodes.inside(path)
    paths = (f"{inside}.iteration-iterations({i}:{i})" for i in count())
    if "raw" in items:
        return islice(paths, len(json.loads(items["raw"])))
    known = list(takewhile(nodes.holds, paths))
    # Before the loop begins it counts as the one item that it has at least.
    return iter(known or [f"{path}.iteration-iterations(0:0)"])


def _single(
    pipeline: Mapping[str, Any], spec: Mapping[str, Any], name: str, path: str, nodes: _Nodes
) -> Task:
    component = pipeline["components"][spec["componentRef"]["name"]]
    if "dag" not in component:
        return _made(name, nodes.find(path, [POD]), ())
    inner = component["dag"]["tasks"]
    firsts = [*inner, *(f"{key}{DRIVER}" for key in inner)]
    node = nodes.find(path, firsts)
    return _made(name, node, _tasks(pipeline, component["dag"], path, nodes))


def _made(name: str, node: Any | None, children: tuple[Task, ...]) -> Task:
    if node is None:
        return Task(name, children=children)
    return Task(
        name,
        state=node.state or "PENDING",
        started=moment(node.start_time),
        finished=moment(node.end_time),
        error=_error(node),
        children=children,
    )


def _listed(details: Sequence[Any]) -> tuple[Task, ...]:
    """The nodes as they are listed, under the parents that they name."""
    known = {each.task_id for each in details}
    under: dict[str | None, list[Any]] = defaultdict(list)
    for each in sorted(
        details, key=lambda each: moment(each.start_time) or datetime.max.replace(tzinfo=UTC)
    ):
        if not _is_inner(each.display_name):
            parent = each.parent_task_id if each.parent_task_id in known else None
            under[parent].append(each)

    def below(parent: str | None) -> tuple[Task, ...]:
        return tuple(_made(each.display_name, each, below(each.task_id)) for each in under[parent])

    return below(None)


def _details(run: Any) -> list[Any]:
    return (run.run_details.task_details if run.run_details else None) or []


def _named(run: Any) -> list[Any]:
    """The nodes among what the backend lists; executions have no names."""
    return [each for each in _details(run) if each.display_name]


def _is_inner(name: str) -> bool:
    """Whether a node is Kubeflow's own, or one attempt of the node that stands for all."""
    return name == POD or name.endswith(DRIVER) or re.search(r"\(\d+\)$", name) is not None


def moment(value: datetime | None) -> datetime | None:
    """A time of the API, which writes 1970 where there is none yet."""
    return value if value is not None and value.timestamp() > 0 else None


def _children(detail: Any) -> list[str]:
    return [each.pod_name for each in detail.child_tasks or () if each.pod_name]


def _error(detail: Any) -> str | None:
    message = detail.error.message if detail.error else None
    return " ".join(message.split()) if message else None
