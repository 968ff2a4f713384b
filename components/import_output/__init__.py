"""Brings existing files into a pipeline."""
