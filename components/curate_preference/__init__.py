"""Stage 4: turns ratings into confidence-weighted preferences."""
