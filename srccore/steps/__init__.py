"""A stage as one pod of a pipeline runs it."""
