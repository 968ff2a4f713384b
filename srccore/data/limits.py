"""The largest data that is accepted, checked where a data set is read.

A data set may come from anywhere. Without limits, a file of a megabyte can take all the memory of
a pod, and a text that no model has room for is only noticed in the middle of a run. Each limit is
far above what the method is made for: questions and rationales of a few sentences, and images that
a model scales to about a megapixel (reconstruction).
"""

from __future__ import annotations

__all__ = [
    "MAX_ASPECT_RATIO",
    "MAX_CHARACTERS",
    "MAX_COLUMNS",
    "MAX_EXPANSION",
    "MAX_FACT_CHARACTERS",
    "MAX_IMAGE_BYTES",
    "MAX_IMAGE_PIXELS",
    "MAX_IMAGE_SIDE",
    "MAX_ITEMS",
    "MAX_LINE_BYTES",
    "MAX_RECORD_BYTES",
]

MAX_CHARACTERS = {"id": 256, "question": 20_000, "answer": 1_000, "rationale": 20_000}
"""Characters of each text of a sample."""
MAX_ITEMS = 100
"""Facts of a sample, and aliases of a fact."""
MAX_FACT_CHARACTERS = 1_000
"""Characters of each text of a fact."""
MAX_LINE_BYTES = 2**20
"""Bytes of a line of JSON Lines."""
MAX_RECORD_BYTES = 16 * 2**20
"""Bytes of a line of a record file, which has all candidates of a sample."""
MAX_COLUMNS = 100
"""Columns of a Parquet file, counting those inside structs."""
MAX_EXPANSION = 200
"""How many times its size a column chunk of a Parquet file may take in memory, if that is more
than an image may have (`MAX_IMAGE_BYTES`)."""
MAX_IMAGE_BYTES = 64 * 2**20
"""Bytes of an encoded image."""
MAX_IMAGE_PIXELS = 40_000_000
"""Decoding a larger image could exhaust the memory."""
MAX_IMAGE_SIDE = 10_000
"""Pixels of the longer side of an image: some processors pad images to squares."""
MAX_ASPECT_RATIO = 100
"""Longer to shorter side of an image: some processors scale the shorter side to a fixed size."""
