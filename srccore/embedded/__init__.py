"""The embedded default of preset `tiny`: a little world, its data set and its models."""
