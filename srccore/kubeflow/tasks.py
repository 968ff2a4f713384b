"""The tree of a run's tasks: its shape comes from the pipeline, its states from the backend.

Pure. The backend returns the nodes of the run's Argo workflow as a flat list, and leaves
``parent_task_id``, ``pod_name`` and ``error`` empty (read in the sources of 2.15 to 2.17, seen in
2.17). Names don't identify a task: ``evaluate`` occurs once per round, and some entries have no
name at all. What the backend does return is ``child_tasks``, whose ``pod_name`` is the ID of the
next node: the workflow's name and a hash of the node's full path (Argo's ``Workflow.NodeID``). The
paths follow from the pipeline:

    round-2                    a nested pipeline: its tasks are under <path>.round-2
    round-2.evaluate           a task: its pod is <path>.evaluate.executor
    round-2.loop               a loop: item 3 is <path>.loop.iteration-iterations(3:3)

Each of them is preceded by a node whose name ends with ``-driver``. If a template has a retry
strategy, which every template has with the defaults of the 2.17 installation, <path> is the node
of all attempts, and its content is under <path>(0), then under <path>(1) after a retry, and so on.
This includes the root, whose path is the workflow's name. A task is therefore the node of its name
with a child whose ID is the hash of a path under the task's own. If the run has no pipeline (its
uploaded version has been deleted), its nodes are shown as they are listed.
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

__all__ = ["DONE", "Task", "failures", "last_report", "node_id", "task_tree", "walk"]

DONE = frozenset({"SUCCEEDED", "SKIPPED"})
DRIVER = "-driver"
POD = "executor"
USUAL_DELAY = timedelta(minutes=2)
"""How far the backend usually lags behind; its agent reports every half a minute."""


@dataclass(frozen=True)
class Task:
    """A task of a run, a nested pipeline, or a loop.

    Args:
        name: Its display name in the pipeline.
        state: One of the API's states; ``PENDING`` until the backend lists it.
        started: When it started.
        finished: When it ended.
        error: The backend's message about its failure.
        children: The tasks inside it.
    """

    name: str
    state: str = "PENDING"
    started: datetime | None = None
    finished: datetime | None = None
    error: str | None = None
    children: tuple[Task, ...] = ()


class _Nodes:
    """Finds the nodes that the backend lists by their path."""

    def __init__(self, details: Sequence[Any]) -> None:
        self.ids = frozenset(each for detail in details for each in _children(detail))
        # An ID is the workflow's name and a hash.
        self.workflow = min(self.ids, default="").rpartition("-")[0]
        self.by_name: dict[str, list[Any]] = defaultdict(list)
        for detail in details:
            self.by_name[detail.display_name].append(detail)

    def has(self, path: str) -> bool:
        """Whether a node with this path exists."""
        return node_id(self.workflow, path) in self.ids

    def inside(self, path: str) -> str:
        """The prefix of the paths under a path: the path itself, or its last attempt."""
        attempts = takewhile(self.has, (f"{path}({number})" for number in count()))
        *_, last = path, *attempts
        return last

    def find(self, path: str, inner: Sequence[str]) -> Any | None:
        """The node of a path, identified by its first attempt or by a node inside it."""
        wanted = {node_id(self.workflow, f"{path}.{name}") for name in inner}
        wanted.add(node_id(self.workflow, f"{path}(0)"))
        alike = self.by_name.get(path.rpartition(".")[2], [])
        return next((each for each in alike if wanted & set(_children(each))), None)


def node_id(workflow: str, path: str) -> str:
    """The ID of a node in Argo: the workflow's name and the FNV-1a hash of the node's path.

    Args:
        workflow: The workflow's name.
        path: The node's full path, which starts with that name.
    """
    value = 0x811C9DC5
    for byte in path.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return f"{workflow}-{value}"


def task_tree(run: Any) -> tuple[Task, ...]:
    """The tasks of a run.

    Args:
        run: A ``V2beta1Run``, as the API returns a single run.

    Returns:
        The tasks of the pipeline's root, in topological order.
    """
    details = _named(run)
    pipeline = run.pipeline_spec or {}
    pipeline = pipeline.get("pipeline_spec", pipeline)
    nodes = _Nodes(details)
    root = f"{nodes.inside(nodes.workflow)}.root"
    is_ours = not details or nodes.has(f"{root}{DRIVER}")
    if "root" in pipeline and is_ours:
        return _tasks(pipeline, pipeline["root"]["dag"], root, nodes)
    return _listed(details)


def walk(tasks: Sequence[Task], above: str = "") -> Iterator[tuple[str, Task]]:
    """All tasks without inner tasks, each with its name starting at the root."""
    for task in tasks:
        name = f"{above}{task.name}"
        if task.children:
            yield from walk(task.children, f"{name} / ")
        else:
            yield name, task


def failures(run: Any) -> list[tuple[str, str | None]]:
    """The names of the tasks that failed, and the backend's message about each."""
    tasks = [(name, task.error) for name, task in walk(task_tree(run)) if task.state == "FAILED"]
    # A driver is not a task, but if it fails, its task never starts.
    drivers = [
        (each.display_name, _error(each))
        for each in _named(run)
        if each.state == "FAILED" and each.display_name.endswith(DRIVER)
    ]
    return tasks + drivers


def last_report(run: Any) -> datetime | None:
    """When the backend last reported on a run's tasks, if it has stopped doing so.

    Argo compresses the nodes of a workflow that exceeds 1 MiB, and Kubeflow does not read
    compressed nodes (seen in 2.17). It then only lists executions, without names.

    Args:
        run: A ``V2beta1Run``, as the API returns a single run.

    Returns:
        The latest time of a named entry; None while tasks are reported as usual.
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
    """The paths of a loop's items: all that the pipeline lists, or else those that exist."""
    inside = nodes.inside(path)
    paths = (f"{inside}.iteration-iterations({i}:{i})" for i in count())
    if "raw" in items:
        return islice(paths, len(json.loads(items["raw"])))
    known = list(takewhile(nodes.has, paths))
    # Before the loop starts, assume the one item that it has at least.
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
    """The nodes as listed, by their start: the backend does not report which are inside others."""
    shown = (each for each in details if not _is_inner(each.display_name))
    tasks = [_made(each.display_name, each, ()) for each in shown]
    return tuple(sorted(tasks, key=lambda task: task.started or datetime.max.replace(tzinfo=UTC)))


def _details(run: Any) -> list[Any]:
    return (run.run_details.task_details if run.run_details else None) or []


def _named(run: Any) -> list[Any]:
    """The listed entries that are nodes; executions have no names."""
    return [each for each in _details(run) if each.display_name]


def _is_inner(name: str) -> bool:
    """Whether a node is internal to Kubeflow, or a single attempt."""
    return name == POD or name.endswith(DRIVER) or re.search(r"\(\d+\)$", name) is not None


def moment(value: datetime | None) -> datetime | None:
    """A time of the API; None for 1970, which stands for a time not known yet."""
    return value if value is not None and value.timestamp() > 0 else None


def _children(detail: Any) -> list[str]:
    return [each.pod_name for each in detail.child_tasks or () if each.pod_name]


def _error(detail: Any) -> str | None:
    message = detail.error.message if detail.error else None
    return " ".join(message.split()) if message else None
