"""Self-Rationale Calibration (SRC): the method as plain functions over files."""

__version__ = "0.1.0"
