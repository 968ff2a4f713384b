"""Asks a teacher to rate pairs of sampled responses."""
