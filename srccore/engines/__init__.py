"""Engines run the models: they sample sentences and read next-token distributions."""
