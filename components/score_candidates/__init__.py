"""Stage 3: R-Scorer rates every ordered pair of candidates."""
