"""The three-round pipeline, and the commands that submit it."""
