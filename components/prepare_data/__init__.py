"""Writes the three splits of a data set."""
