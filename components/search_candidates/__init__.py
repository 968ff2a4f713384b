"""Stage 2: sentence-level beam search for candidate responses."""
