"""Asks a teacher to write the rationales missing from a data set."""
