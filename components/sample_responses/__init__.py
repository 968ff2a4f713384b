"""Samples the responses that R-Scorer learns from."""
