"""Trains R-Scorer on teacher ratings."""
