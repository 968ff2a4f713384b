"""Data sets as stages read them: texts first, images as they are used.

The texts of a split that prepare-data wrote are in its index, a file of megabytes. A pod fetches
that, and of the split itself, which has gigabytes, the images that its samples need, one by one.
"""

from __future__ import annotations

import functools
from pathlib import Path

from srccore import storage
from srccore.data.dataset import CHANGED, DataSet, open_data, read_place
from srccore.data.images import ImageError
from srccore.data.index import ImagePlace, index_of
from srccore.data.records import Sample
from srccore.errors import UserError
from srccore.method.engine import Prompt

__all__ = ["fetch", "fetch_index", "open_split", "prompt"]


def fetch(uri: str) -> Path:
    """Brings an input to this machine; of a split that has an index, only that.

    Returns:
        Where the input is, or where it would be if it was fetched: `open_split` opens both.

    Raises:
        UserError: There is nothing, or the store denies access.
    """
    if not fetch_index(uri):
        return storage.fetch(uri)
    # What was fetched of the split before it was written again would be read instead of it.
    storage.drop_stale(uri)
    return storage.local_path(uri)


def fetch_index(uri: str) -> bool:
    """Brings the index of a data set in a bucket to this machine, or deletes an old one there.

    Returns:
        Whether the bucket has an index.

    Raises:
        UserError: The store denies access.
    """
    if not storage.is_remote(uri) or not uri.endswith(".parquet"):
        return False
    index = index_of(uri)
    if storage.exists(index):
        storage.fetch(index)
        return True
    storage.drop_stale(index)
    return False


def open_split(path: Path) -> DataSet:
    """Opens a data set; images that are still in a bucket are fetched as they are used.

    Args:
        path: The data set, as `fetch` returns it.

    Raises:
        UserError: It is not a data set, or a row is bad.
    """
    return open_data(path, _read)


def _read(path: Path, place: ImagePlace) -> bytes:
    if path.exists() or place.sha256 is None:
        return read_place(path, place)
    try:
        uri = storage.address_of(path)
    except ValueError:
        raise UserError(
            f"{path} is missing; its index is there.",
            f"Put the file next to {index_of(path.name)}, or run prepare-data again.",
        ) from None
    found = storage.fetch_part(uri, place.start, place.length, place.sha256)
    if found is None:
        raise ImageError(CHANGED)
    return found


def prompt(data: DataSet, sample: Sample) -> Prompt:
    """Asks a policy a sample's question."""
    image = functools.partial(data.image, sample.id)
    return Prompt(image, sample.question, data.image_key(sample.id))
