"""Brings what exists already into a pipeline."""
