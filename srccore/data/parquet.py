"""Parquet files in Hugging Face layout: written with an index, streamed where they have none.

`parquet_writer` stores images uncompressed and writes an index (`srccore.data.index`) beside the
file, which says where each image is. Files without an index are streamed: memory is bounded by
their largest page, not by their row groups. What a file says about itself is checked against
`srccore.data.limits` before it is read: a few kilobytes can stand for gigabytes.

Files are read, not mapped into memory: what a process has resident is what it uses, and a file that
is cut off while it is open is an error instead of a signal.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from srccore.data.images import ImageError, measure
from srccore.data.index import Entry, ImagePlace, entry_line, index_of, last_line
from srccore.data.limits import (
    MAX_COLUMNS,
    MAX_EXPANSION,
    MAX_FACT_CHARACTERS,
    MAX_IMAGE_BYTES,
    MAX_ITEMS,
)
from srccore.data.records import Sample
from srccore.data.rows import Row
from srccore.data.texts import shortened
from srccore.errors import UserError
from srccore.files import atomically

__all__ = ["ParquetTable", "ParquetWriter", "parquet_writer"]

# The larger a group, the smaller the footer, of which readers keep 16 KB a group in memory; but a
# writer keeps three times a group.
_GROUP_BYTES = 8 * 2**20
_GROUP_ROWS = 1024
_AT_ONCE = 4 * 2**20
"""Bytes of rows that are in memory together when a file is streamed."""
_BUFFER = 2**20


@contextmanager
def parquet_writer(path: Path) -> Iterator[ParquetWriter]:
    """Writes a file and its index, whole or not at all.

    ``datasets.load_dataset("parquet", data_files=...)`` reads its images as an Image feature.

    Args:
        path: The file to write, ending in ``.parquet``; its folder must exist.

    Yields:
        What takes the rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with (
        # Replaced after the file: until then, the old index says that the new file is another.
        atomically(Path(index_of(str(path)))) as index,
        atomically(path) as temporary,
        index.open("wb") as lines,
    ):
        with (
            pa.OSFile(str(temporary), "wb") as sink,
            # Encoded images don't compress, and statistics would repeat small ones in the footer.
            pq.ParquetWriter(
                sink,
                _schema(),
                use_dictionary=["category"],
                compression="none",
                write_statistics=False,
            ) as file,
        ):
            writer = ParquetWriter(file, sink, temporary, lines)
            yield writer
            writer.flush()
        lines.write(last_line(temporary.stat().st_size))


class ParquetWriter:
    """Takes the rows of a file, and writes each group as soon as it is full.

    Args:
        file: A `pyarrow.parquet.ParquetWriter`.
        sink: The `pyarrow.OSFile` that it writes to.
        path: The file's path.
        index: Receives the index.
    """

    def __init__(self, file: Any, sink: Any, path: Path, index: BinaryIO) -> None:
        self.count = 0
        self._file = file
        self._sink = sink
        self._path = path
        self._index = index
        self._rows: list[tuple[Sample, bytes, tuple[int, int]]] = []
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
            size = measure(encoded)
        except ImageError as error:
            raise UserError(
                f"Sample {sample.id!r} cannot be written: {error}.", "Fix or drop the sample."
            ) from None
        if self._bytes + len(encoded) > _GROUP_BYTES or len(self._rows) == _GROUP_ROWS:
            self.flush()
        self._rows.append((sample, encoded, size))
        self._bytes += len(encoded)
        self.count += 1

    def flush(self) -> None:
        """Writes the rows that are held as a group, and to the index where their images are."""
        import pyarrow as pa

        if not self._rows:
            return
        values = [
            sample.model_dump(mode="json") | {"image": {"bytes": encoded, "path": None}}
            for sample, encoded, _ in self._rows
        ]
        first = self._sink.tell()
        self._file.write_table(pa.Table.from_pylist(values, schema=_schema()))
        with self._path.open("rb") as file:
            file.seek(first)
            written = file.read(self._sink.tell() - first)
        place = 0
        for sample, encoded, (width, height) in self._rows:
            # Parquet has the bytes of a value in one piece, and those of a column in their order.
            place = written.index(encoded, place)
            image = ImagePlace(
                start=first + place,
                length=len(encoded),
                width=width,
                height=height,
                sha256=hashlib.sha256(encoded).hexdigest(),
            )
            self._index.write(entry_line(Entry(sample=sample, image=image)))
            place += len(encoded)
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
        self._check_columns()
        for group in range(self._metadata.num_row_groups):
            self._check_group(group)

    def _check_columns(self) -> None:
        fix = "Keep the columns that docs/research.md lists."
        if (count := self._metadata.num_columns) > MAX_COLUMNS:
            raise UserError(f"{self.path} has {count:,} columns, more than {MAX_COLUMNS}.", fix)
        twice = [name for name, count in Counter(self._names).items() if count > 1]
        if twice:
            raise UserError(f"{self.path} has several columns {shortened(twice[0])!r}.", fix)

    def _check_group(self, number: int) -> None:
        group = self._metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            size, stored = column.total_uncompressed_size, max(1, column.total_compressed_size)
            # Values that repeat the one before take no room in a file.
            most = MAX_ITEMS * group.num_rows + _AT_ONCE
            if (
                size > max(MAX_IMAGE_BYTES, MAX_EXPANSION * stored)
                or min(size, stored) < 0
                or column.num_values > most
            ):
                raise UserError(
                    f"The column {shortened(column.path_in_schema)!r} of {self.path} is stored in "
                    f"{stored:,} bytes, but stands for {size:,} bytes or {column.num_values:,} "
                    "values.",
                    "Write the file again, with less in each row.",
                )

    def texts(self, first: int) -> Iterator[Row]:
        """Yields the rows without their images.

        Args:
            first: The number of the first row.
        """
        for number, values in self._values(first, [n for n in self._names if n != "image"]):
            yield Row(number, values)

    def streamed(self, first: int) -> Iterator[Row]:
        """Yields the rows with their images, from a few at a time.

        Args:
            first: The number of the first row.
        """
        for number, values in self._values(first, self._names):
            image = functools.partial(_open_value, values.pop("image", None))
            if "image" in self._names:
                yield Row(number, values, image)
            else:
                yield Row(number, values, reasons=("image is missing",))

    def _values(self, first: int, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields number and values of each row."""
        import pyarrow.parquet as pq

        number = itertools.count(first)
        with (
            _explained(self.path),
            # Buffered and not ahead: else a group's columns are read whole before the first page.
            pq.ParquetFile(
                self.path,
                metadata=self._metadata,
                buffer_size=_BUFFER,
                pre_buffer=False,
                read_dictionary=self._texts,
            ) as file,
        ):
            # Group by group: over several groups, Arrow keeps what it has read of each.
            for group in range(self._metadata.num_row_groups):
                for found in file.iter_batches(
                    batch_size=self._few(group) if "image" in columns else 1024,
                    row_groups=[group],
                    columns=columns,
                    use_threads=False,
                ):
                    for values in _values_of(found, self.path):
                        yield next(number), _without_nulls(values)

    def _few(self, number: int) -> int:
        """Rows of a group whose images may be in memory together."""
        group = self._metadata.row_group(number)
        size = repeated = 0
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.partition(".")[0] == "image":
                size += (whole := column.total_uncompressed_size)
                if column.has_dictionary_page:
                    # Each row may have the largest value of a dictionary, which is no larger than
                    # this, since no page is stored in much more than its size.
                    stored = column.data_page_offset - column.dictionary_page_offset
                    repeated += whole - column.total_compressed_size + stored
        few: int = min(
            _AT_ONCE * group.num_rows // max(1, size), MAX_IMAGE_BYTES // max(1, repeated)
        )
        return max(1, min(64, few))

    @property
    def _texts(self) -> list[str]:
        """The columns of texts, which stay as small as they are stored until they are checked."""
        schema = self._metadata.schema
        columns = map(schema.column, range(len(schema)))
        return [each.path for each in columns if each.path.partition(".")[0] != "image"]


def _values_of(batch: Any, path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a batch, one at a time where texts are long."""
    import pyarrow as pa

    longest = 0
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name == "facts":
            _check_nested(column, path)
        elif pa.types.is_dictionary(column.type):
            longest += _longest(column.dictionary)
    count = 1 if longest * batch.num_rows > MAX_IMAGE_BYTES else batch.num_rows
    for start in range(0, batch.num_rows, count):
        few = batch.slice(start, count)
        columns = [
            # Faster than Arrow's conversion of a dictionary.
            each.dictionary_decode() if pa.types.is_dictionary(each.type) else each
            for each in few.columns
        ]
        yield from pa.RecordBatch.from_arrays(columns, names=few.schema.names).to_pylist()


def _longest(values: Any) -> int:
    """The size of the longest text, list or value of an array, in bytes or values."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = pc.list_value_length(values)
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        lengths = pc.binary_length(values)
    else:
        return 0
    return int(pc.max(lengths).as_py() or 0)


def _check_nested(values: Any, path: Path) -> None:
    """Checks the sizes of facts while they are Arrow's, where what repeats takes no memory."""
    import pyarrow as pa

    kind = values.type
    is_text = pa.types.is_string(kind) or pa.types.is_binary(kind)
    limit = 4 * MAX_FACT_CHARACTERS if is_text else MAX_ITEMS
    if (largest := _longest(values)) > limit:
        raise UserError(
            f"The facts of a row of {path} have a list or text of {largest:,}, "
            f"more than {limit:,}.",
            "Shorten it.",
        )
    if pa.types.is_dictionary(kind):
        _check_nested(values.dictionary, path)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        _check_nested(values.flatten(), path)
    elif pa.types.is_struct(kind):
        for part in values.flatten():
            _check_nested(part, path)


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
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Arrow raises all kinds of errors on broken bytes.
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"The Parquet file {path} cannot be read ({reason}).", "Write or copy it again."
        ) from error


@functools.cache
def _schema() -> Any:
    """Builds the Arrow schema of `parquet_writer`, with the features that `datasets` looks for."""
    import pyarrow as pa

    text = {"dtype": "string", "_type": "Value"}
    truth = {"dtype": "bool", "_type": "Value"}
    fact = dict.fromkeys(("subject", "relation", "value"), text)
    features = {
        **dict.fromkeys(("id", "category"), text),
        "image": {"_type": "Image"},
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
        "facts": pa.list_(fact_type),
    }
    return pa.schema(
        [(name, types.get(name, pa.string())) for name in features],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
