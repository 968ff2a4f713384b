"""Brings what exists already into a pipeline."""

from kfp.dsl import Artifact, Output

from srccore.components.interface import stage_component

__all__ = ["import_output"]


@stage_component("import-output")
def import_output(uri: str, output: Output[Artifact]):
    """Refers to a file or folder that is there already.

    For candidates, labelled pairs, rationales, an R-Scorer, a policy or a data set that an earlier
    run made, or that you have in the same form. Nothing is copied. Turn Kubeflow's cache off for
    this task: it takes seconds, and what lies at the URI may have changed.

    Args:
        uri: The file or folder, ``s3://...`` or a path that every pod mounts.
        output: Output. A reference; give it to any component of the suite.
    """
    from srccore.steps.step import import_output

    import_output(uri, output.path)
