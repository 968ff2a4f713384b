"""Samples and records: what the stages read and write."""
