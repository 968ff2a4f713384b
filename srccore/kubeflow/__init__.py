"""The client side of Kubeflow Pipelines: connect, submit, schedule and follow."""
