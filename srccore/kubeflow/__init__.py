"""Kubeflow Pipelines as seen from outside: connecting, submitting, scheduling and following."""
