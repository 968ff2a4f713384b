"""What belongs to a training job on the API server: the job that was asked for, and its pods.

Pure. Names, labels and annotations prove nothing, since anyone who may create objects in the
namespace chooses them. A job is the one that was asked for if its spec is; a pod belongs to the job
that owns it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from srccore.cluster.request import Launcher

__all__ = ["difference", "is_pod_of"]

Object = dict[str, Any]

_ADDED = frozenset(
    {
        # By Kueue, which holds a job back and says where its pods may run.
        *("suspend", "managedBy", "nodeSelector", "tolerations", "schedulingGates"),
        *("labels", "annotations", "targetJobs"),
        # Defaults, by any program that rewrites the object.
        *("imagePullPolicy", "terminationMessagePath", "terminationMessagePolicy"),
        *("restartPolicy", "dnsPolicy", "schedulerName", "protocol"),
    }
)
"""What others may add to a spec, and add to: none of it decides what runs, or with which rights."""


def difference(asked: Object, found: Object) -> str | None:
    """Compares a spec with what the API server has.

    Args:
        asked: The spec that was, or would be, created.
        found: The spec of the object.

    Returns:
        The path of the first field that was changed, removed or added, unless it is one that the
        cluster's own programs add; None if there is none.
    """
    return next(_differences("spec", "", asked, found), None)


def _differences(path: str, key: str, asked: Any, found: Any) -> Iterator[str]:
    if isinstance(asked, Mapping) and isinstance(found, Mapping):
        for name in sorted({*asked, *found}):
            inner = f"{path}.{name}"
            if name in asked:
                yield from _differences(inner, name, asked[name], found.get(name))
            elif key not in _ADDED and not _is_harmless(name, found[name]):
                yield inner
    elif isinstance(asked, list) and isinstance(found, list):
        for place, (mine, theirs) in enumerate(zip(asked, found, strict=False)):
            yield from _differences(f"{path}[{place}]", "", mine, theirs)
        if len(found) < len(asked):
            yield f"{path}[{len(found)}]"
        for place in range(len(asked), len(found)):
            if key not in _ADDED and not _is_harmless("", found[place]):
                yield f"{path}[{place}]"
    elif not (_is_equal(asked, found) or (_is_empty(asked) and _is_empty(found))):
        yield path


def _is_harmless(name: str, value: Any) -> bool:
    """Whether a field may have been added: it, or everything in it."""
    if name in _ADDED or _is_empty(value):
        return True
    return isinstance(value, Mapping) and all(
        _is_harmless(each, inner) for each, inner in value.items()
    )


def _is_empty(value: Any) -> bool:
    return value is None or value in ({}, [], "")


def _is_equal(asked: Any, found: Any) -> bool:
    """Whether two values are equal, also as quantities: programs write 1000m as 1."""
    from kubernetes.utils import parse_quantity

    if not (isinstance(asked, str) and isinstance(found, str)):
        return bool(asked == found)
    try:
        return asked == found or bool(parse_quantity(asked) == parse_quantity(found))
    except ValueError:
        return False


def is_pod_of(launcher: Launcher, job: Object, pod: Object) -> bool:
    """Whether a pod with a job's label is one of its pods.

    Args:
        launcher: The launcher of the job.
        job: The job.
        pod: The pod.
    """
    metadata = job["metadata"]
    made, began = pod["metadata"]["creationTimestamp"], metadata["creationTimestamp"]
    owners: Sequence[Object] = pod["metadata"].get("ownerReferences") or []
    for owner in owners:
        if not owner.get("controller"):
            continue
        if not launcher.maker:
            return bool(owner["uid"] == metadata["uid"])
        # The object in between cannot be read with the step's role, but an earlier job's is older.
        return bool(owner["name"] == f"{metadata['name']}{launcher.maker}" and made >= began)
    return False
