"""Stage 5: preference fine-tuning of the round's policy."""
