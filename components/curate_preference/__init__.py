"""Stage 4: ratings to confidence-weighted preferences."""
