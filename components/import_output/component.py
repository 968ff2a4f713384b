"""Brings existing files into a pipeline."""

from kfp.dsl import Artifact, Output

from srccore.components.interface import stage_component

__all__ = ["import_output"]


@stage_component("import-output")
def import_output(uri: str, output: Output[Artifact]):
    """Refers to an existing file or folder.

    Use it for candidates, labelled pairs, rationales, an R-Scorer, a policy or a data set of an
    earlier run, or of your own in the same format. Nothing is copied. Turn Kubeflow's cache off for
    this task: it takes seconds, and the content at the URI may have changed.

    Args:
        uri: The file or folder: ``s3://...``, or a path that every pod mounts.
        output: Output. A reference to it, which any component of the suite accepts.
    """
    from srccore.steps.step import import_output

    import_output(uri, output.path)
