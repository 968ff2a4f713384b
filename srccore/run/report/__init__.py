"""The report of a run: gathering its data and writing its page."""
