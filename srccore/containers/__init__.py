"""The container images: what they are called, and how they are built and pushed."""
