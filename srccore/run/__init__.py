"""A run on one machine: the loop, its console, its exports and its report."""
