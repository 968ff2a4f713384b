"""A training stage as a job on a Kubernetes cluster: created, watched and explained."""
