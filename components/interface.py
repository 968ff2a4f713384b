"""The basis of all components: a lightweight Python component in the image of its stage.

A component is an interface with a single call as its body; `srccore.steps` does the work.
Importing a component requires only kfp. Nothing is installed when a pod starts. The modules do not
use ``from __future__ import annotations``, which kfp cannot read, and use ``List``, the only
spelling that kfp supports. An optional artifact is ``Input[Dataset] = None``: with ``Optional``
around it, kfp 2.17 takes the ``Union`` for the artifact's class, but only on a real backend.
"""

import functools
from collections.abc import Callable
from typing import Any

from kfp import dsl

from srccore.containers.names import Images

__all__ = ["stage_component"]


def stage_component(stage: str) -> Callable[..., Any]:
    """Creates the component of a stage.

    Args:
        stage: The name of the stage, which is also the name of its image.

    Returns:
        A decorator for the interface.
    """
    return functools.partial(
        dsl.component,
        base_image=Images().of(stage),
        packages_to_install=[],
        install_kfp_package=False,
    )
