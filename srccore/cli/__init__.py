"""The command line, ``srccore``: one module for each group of commands."""
