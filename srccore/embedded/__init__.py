"""The embedded default: a small real world, its data set and its models (preset `tiny`)."""
