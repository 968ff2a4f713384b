"""Parquet files in Hugging Face layout: written for random access, read group by group.

A file that `parquet_writer` wrote has small row groups of uncompressed images, and three columns
that describe each image: ``width``, ``height`` and ``image_sha256``. Such a file is opened without
reading an image, and one image costs one small group. Files from elsewhere are streamed: memory is
bounded by their largest page, not by their row groups.

Files are read, not mapped into memory: what a process has resident is what it uses, and a file that
is cut off while it is open is an error instead of a signal.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from srccore.data.images import ImageError, measure
from srccore.data.records import Sample
from srccore.data.rows import Recorded, Row
from srccore.errors import UserError
from srccore.files import atomically

__all__ = ["RECORDED", "ParquetTable", "ParquetWriter", "parquet_writer"]

RECORDED = ("width", "height", "image_sha256")
"""The columns that describe an image."""
# The smaller a group, the less is read for one image; but every group takes 16 KB of memory, for
# what the footer says about its columns.
_GROUP_BYTES = 4 * 2**20
_GROUP_ROWS = 256
_LARGEST_GROUP = 8 * 2**20
"""Larger groups are not read for one image."""
_KEPT_GROUPS = 16
"""Groups whose images a process keeps: at most 128 MiB, and 64 MiB of what `parquet_writer` wrote,
unless single images are larger than a group."""
_BUFFER = 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@contextmanager
def parquet_writer(path: Path) -> Iterator[ParquetWriter]:
    """Writes a file, whole or not at all.

    ``datasets.load_dataset("parquet", data_files=...)`` reads its images as an Image feature.

    Args:
        path: The file to write, ending in ``.parquet``; its folder must exist.

    Yields:
        What takes the rows.
    """
    import pyarrow.parquet as pq

    with (
        atomically(path) as temporary,
        # Encoded images don't compress, and statistics would repeat small ones in the footer.
        pq.ParquetWriter(
            temporary,
            _schema(),
            use_dictionary=["category"],
            compression="none",
            write_statistics=False,
        ) as file,
    ):
        writer = ParquetWriter(file)
        yield writer
        writer.flush()


class ParquetWriter:
    """Takes the rows of a file, and writes each group as soon as it is full.

    Args:
        file: A `pyarrow.parquet.ParquetWriter`.
    """

    def __init__(self, file: Any) -> None:
        self.count = 0
        self._file = file
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def add(self, sample: Sample, encoded: bytes) -> None:
        """Adds a row.

        Args:
            sample: The sample.
            encoded: Its image as a file has it (PNG, JPEG, ...).

        Raises:
            UserError: It is not an image, or is too large.
        """
        try:
            width, height = measure(encoded)
        except ImageError as error:
            raise UserError(
                f"Sample {sample.id!r} cannot be written: {error}.", "Fix or drop the sample."
            ) from None
        if self._bytes + len(encoded) > _GROUP_BYTES or len(self._rows) == _GROUP_ROWS:
            self.flush()
        described = (width, height, hashlib.sha256(encoded).hexdigest())
        self._rows.append(
            sample.model_dump(mode="json")
            | {"image": {"bytes": encoded, "path": None}}
            | dict(zip(RECORDED, described, strict=True))
        )
        self._bytes += len(encoded)
        self.count += 1

    def flush(self) -> None:
        """Writes the rows that are held as a group."""
        import pyarrow as pa

        if self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, schema=_schema()))
        self._rows, self._bytes = [], 0


class ParquetTable:
    """One file, opened for reading.

    Args:
        path: The file.

    Raises:
        UserError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        with _explained(path):
            self._metadata = pq.read_metadata(path)
            self._names = self._metadata.schema.to_arrow_schema().names
        self._is_recorded = set(RECORDED) <= set(self._names)

    @functools.cached_property
    def is_indexed(self) -> bool:
        """Whether single images can be read, and their sizes and hashes are known."""
        groups = (self._metadata.row_group(n) for n in range(self._metadata.num_row_groups))
        return self._is_recorded and all(
            group.total_byte_size <= _LARGEST_GROUP or group.num_rows == 1 for group in groups
        )

    def texts(self, first: int) -> Iterator[Row]:
        """Yields the rows without their images.

        Args:
            first: The number of the first row.
        """
        for number, _, _, values in self._values(first, [n for n in self._names if n != "image"]):
            recorded, reasons = self._recorded(values)
            yield Row(number, values, recorded=recorded, reasons=reasons)

    def indexed(self, first: int) -> Iterator[Row]:
        """Yields the rows of a file that `is_indexed`; an image is read when it is opened.

        Args:
            first: The number of the first row.
        """
        columns = [name for name in self._names if name != "image"]
        for number, group, index, values in self._values(first, columns):
            recorded, reasons = self._recorded(values)
            image = functools.partial(self._image, group, index)
            yield Row(
                number, values, None if reasons else image, recorded=recorded, reasons=reasons
            )

    def streamed(self, first: int) -> Iterator[Row]:
        """Yields the rows with their images, from a few at a time.

        Args:
            first: The number of the first row.
        """
        for number, _, _, values in self._values(first, self._names, self._few):
            image = functools.partial(_open_value, values.pop("image", None))
            recorded, reasons = self._recorded(values)
            if "image" in self._names:
                yield Row(number, values, image, True, recorded, reasons=reasons)
            else:
                yield Row(number, values, reasons=("image is missing", *reasons))

    @property
    def _few(self) -> int:
        """Rows whose images may be in memory together."""
        groups = (self._metadata.row_group(n) for n in range(self._metadata.num_row_groups))
        largest = max((g.total_byte_size // max(1, g.num_rows) for g in groups), default=0)
        # Few even if they seem to be tiny: a dictionary stores repeated images once.
        return max(1, min(64, _GROUP_BYTES // max(1, largest)))

    def _values(
        self, first: int, columns: list[str], batch: int = 1024
    ) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
        """Yields number, group, place in the group and values of each row."""
        number = itertools.count(first)
        with _explained(self.path), self._opened() as file:
            # Group by group: over several groups, Arrow keeps what it has read of each.
            for group in range(self._metadata.num_row_groups):
                index = itertools.count()
                for found in file.iter_batches(
                    batch_size=batch, row_groups=[group], columns=columns, use_threads=False
                ):
                    for values in found.to_pylist():
                        yield next(number), group, next(index), _without_nulls(values)

    def _recorded(self, values: dict[str, Any]) -> tuple[Recorded | None, tuple[str, ...]]:
        """Takes what describes the image out of a row's values."""
        if not self._is_recorded:
            return None, ()
        width, height, sha256 = (values.pop(name, None) for name in RECORDED)
        if not all(isinstance(side, int) and side > 0 for side in (width, height)):
            return None, ("width or height is not a positive integer",)
        if not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
            return None, ("image_sha256 is not a SHA-256 in hexadecimal",)
        return Recorded((width, height), sha256), ()

    def _image(self, group: int, index: int) -> BinaryIO:
        return _open_value(_images(self, group)[index].as_py())

    def images(self, group: int) -> Any:
        """Reads the images of a group, as an Arrow column."""
        with _explained(self.path), self._opened() as file:
            return file.read_row_group(group, columns=["image"], use_threads=False).column("image")

    def _opened(self) -> Any:
        """Opens the file for one reader: several threads may read at once."""
        import pyarrow.parquet as pq

        # Buffered and not ahead: else a group's columns are read whole before the first page.
        return pq.ParquetFile(
            self.path, metadata=self._metadata, buffer_size=_BUFFER, pre_buffer=False
        )


@functools.lru_cache(maxsize=_KEPT_GROUPS)
def _images(table: ParquetTable, group: int) -> Any:
    return table.images(group)


def _open_value(value: Any) -> BinaryIO:
    encoded = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(encoded, bytes):
        return io.BytesIO(encoded)
    if value is None:
        raise ImageError("image is missing")
    raise ImageError("image has no bytes, only a path, which is not opened; embed the images")


def _without_nulls(value: Any) -> Any:
    """Drops nulls, with which Arrow fills the absent fields of a struct, so defaults apply."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"The Parquet file {path} cannot be read ({error}).", "Write or copy it again."
        ) from None


@functools.cache
def _schema() -> Any:
    """Builds the Arrow schema of `parquet_writer`, with the features that `datasets` looks for."""
    import pyarrow as pa

    text = {"dtype": "string", "_type": "Value"}
    number = {"dtype": "int32", "_type": "Value"}
    truth = {"dtype": "bool", "_type": "Value"}
    fact = dict.fromkeys(("subject", "relation", "value"), text)
    features = {
        **dict.fromkeys(("id", "category"), text),
        "image": {"_type": "Image"},
        **dict(zip(RECORDED, (number, number, text), strict=True)),
        **dict.fromkeys(("question", "answer", "rationale"), text),
        # A list in brackets is the form that all versions of `datasets` read.
        "facts": [{**fact, "aliases": [text], "visual": truth, "needed": truth}],
    }
    fact_type = pa.struct(
        [(name, pa.string()) for name in fact]
        + [("aliases", pa.list_(pa.string())), ("visual", pa.bool_()), ("needed", pa.bool_())]
    )
    types = {
        "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "width": pa.int32(),
        "height": pa.int32(),
        "facts": pa.list_(fact_type),
    }
    return pa.schema(
        [(name, types.get(name, pa.string())) for name in features],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
