"""Kubeflow Pipelines components, one per stage of SRC.

``from srccore.components import search_candidates``: the names are those of the table of stages.
Importing them needs kfp and no model library. Each is also beside its code as ``component.yaml``,
to be loaded by path or URL.
"""

import importlib

from srccore.stages.table import STAGES

__all__ = [*(stage.python_name for stage in STAGES.values())]  # noqa: PLE0604 - all are strings

for _name in __all__:
    # After its module has been imported: the package of that name would hide the component.
    globals()[_name] = getattr(importlib.import_module(f"{__name__}.{_name}.component"), _name)
