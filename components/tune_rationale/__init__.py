"""Stage 1: teaches the model to write a rationale before its answer."""
