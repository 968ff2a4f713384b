"""What all components have in common: a lightweight Python component in its stage's image.

A component is its interface and a body of one call; the work is done by `srccore.stages`. Importing
one needs kfp and nothing else. Nothing is installed when a pod starts. The modules do without
``from __future__ import annotations``, which kfp cannot read, and use ``List``, the only spelling
that it knows. An artifact that may be missing is ``Input[Dataset] = None``: with ``Optional``
around it kfp 2.17 takes the ``Union`` for the artifact's class, on a real backend alone.
"""

import functools
from collections.abc import Callable
from typing import Any

from kfp import dsl

from srccore.containers.names import Images

__all__ = ["stage_component"]


def stage_component(stage: str) -> Callable[..., Any]:
    """Makes a component of a stage.

    Args:
        stage: The stage's name; the image is named after it.

    Returns:
        A decorator for the interface.
    """
    return functools.partial(
        dsl.component,
        base_image=Images().of(stage),
        packages_to_install=[],
        install_kfp_package=False,
    )
