"""Self-Rationale Calibration (SRC): the method as plain functions over files."""

import importlib.metadata

__version__ = importlib.metadata.version("srccore")
"""Of the installed package; pyproject.toml is its only source."""
