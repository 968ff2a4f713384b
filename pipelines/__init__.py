"""The SRC pipeline: its definition, and how it is compiled and run locally."""
