"""Data sets: samples with their images, read, checked and written.

Two formats with the same columns (``id, category, image, question, answer``, and optionally
``rationale`` and ``facts``):

* Parquet in Hugging Face layout: a ``.parquet`` file, or a folder of them, read in the order of
  their names. ``image`` is ``struct<bytes, path>`` or plain binary; the path is never opened.
* JSON Lines: a folder with ``samples.jsonl``, or a ``.jsonl`` file. ``image`` is a path relative
  to the file's folder and must not leave it.

Rows are numbered from 1: the lines of a JSON Lines file, or the rows of all Parquet files
together. Images stay encoded on disk until they are used: a data set may be larger than memory.

What `write_data` wrote also has each image's size and SHA-256. Such a data set is opened without
reading an image; an image is compared with its hash whenever it is read, so a file that was changed
afterwards is noticed.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from pydantic import ValidationError

from srccore.data.images import ImageError, decode, opened, upright_size
from srccore.data.parquet import ParquetTable, parquet_writer
from srccore.data.records import Category, Sample
from srccore.data.rows import Recorded, Row, json_rows
from srccore.errors import UserError
from srccore.hashing import hash_file

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "DataSet",
    "RowProblem",
    "ValidationReport",
    "content_hash",
    "open_data",
    "read_samples",
    "stream_data",
    "validate",
    "write_data",
]

_REQUIRED = ("id", "category", "question", "answer")
_KNOWN = ("image", *Sample.model_fields)


@dataclass(frozen=True)
class RowProblem:
    """One thing that is wrong with one row."""

    row: int
    """Numbered from 1."""
    id: str | None
    """The sample's id, if the row has one."""
    reason: str


@dataclass(frozen=True)
class ValidationReport:
    """What `validate` found."""

    rows: int
    """All rows, including bad ones."""
    by_category: Mapping[Category, int]
    """Rows of each category, including bad ones; rows of an unknown category are not counted."""
    problems: tuple[RowProblem, ...]
    """Every problem in the order of the rows; a row may have several."""


class _Entry(NamedTuple):
    """The image of a sample: how to open it, and what is known of it."""

    open: Callable[[], BinaryIO]
    size: tuple[int, int]
    sha256: str | None


class DataSet:
    """Samples and their images; made by `open_data`.

    Images are read and decoded on each access and not kept, apart from a few recently used row
    groups of encoded images. Several threads may read at once.
    """

    def __init__(self, path: Path, samples: Sequence[Sample], images: Mapping[str, _Entry]) -> None:
        self.path = path
        self.samples = tuple(samples)
        self._by_id = {sample.id: sample for sample in self.samples}
        self._images = images

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, sample_id: str) -> Sample:
        """Returns the sample with that id.

        Raises:
            UserError: The data set has no such sample.
        """
        return _found(self.path, self._by_id, sample_id)

    def image(self, sample_id: str) -> Image:
        """Returns the sample's image: RGB, rotated upright according to its EXIF data.

        Raises:
            UserError: There is no such sample, its image cannot be decoded, or it is not the one
                that the data set describes.
        """
        try:
            image = decode(self.encoded(sample_id))
            _check_size(image.size, self.size(sample_id))
        except ImageError as error:
            raise self._bad(sample_id, error) from None
        return image

    def size(self, sample_id: str) -> tuple[int, int]:
        """Returns width and height of the sample's image, upright, without reading it.

        Raises:
            UserError: There is no such sample.
        """
        return self._images[self.sample(sample_id).id].size

    def encoded(self, sample_id: str) -> bytes:
        """Returns the sample's image as it is stored, for `write_data`.

        Raises:
            UserError: There is no such sample, or its image is not the one that the data set
                describes.
        """
        entry = self._images[self.sample(sample_id).id]
        try:
            return _read(entry.open, entry.sha256)
        except ImageError as error:
            raise self._bad(sample_id, error) from None

    def _bad(self, sample_id: str, error: ImageError) -> UserError:
        return UserError(f"Sample {sample_id!r} of {self.path}: {error}.", _advice(self.path))


def open_data(path: Path) -> DataSet:
    """Opens a data set and checks every row.

    Of the images it checks the headers, unless the data set describes them: then it reads none.
    The images of Parquet files from elsewhere are copied to a temporary file, since their row
    groups may be too large to read one for one image.

    Args:
        path: A Parquet file, a folder of them, a JSON Lines file or a folder with one.

    Returns:
        The data set, with its samples in the order of the rows.

    Raises:
        UserError: The path is not a data set, or a row is bad; the first bad row is reported.
    """
    copies = _Copies(path)
    samples: list[Sample] = []
    images: dict[str, _Entry] = {}
    for row, sample, size, reasons in _checked(_rows(path, _as_needed), trusting=True):
        if sample is None or row.image is None or size is None:
            raise _bad_row(path, row, reasons)
        samples.append(sample)
        try:
            image = copies.add(row.image) if row.is_held else row.image
        except ImageError as error:
            raise _bad_row(path, row, [str(error)]) from None
        images[sample.id] = _Entry(image, size, row.recorded and row.recorded.sha256)
    return DataSet(path, samples, images)


def read_samples(path: Path, ids: Iterable[str] | None = None) -> list[Sample]:
    """Reads the samples of a data set without reading an image.

    Args:
        path: As for `open_data`.
        ids: Which samples, in which order; all in the order of the rows without it.

    Returns:
        The samples.

    Raises:
        UserError: The path is not a data set, has no sample of one of the ids, or a row is bad;
            the first bad row is reported.
    """
    samples = []
    for row, sample, _, reasons in _checked(_rows(path, ParquetTable.texts), trusting=True):
        if sample is None:
            raise _bad_row(path, row, reasons)
        samples.append(sample)
    if ids is None:
        return samples
    by_id = {sample.id: sample for sample in samples}
    return [_found(path, by_id, sample_id) for sample_id in ids]


def stream_data(path: Path) -> Iterator[tuple[Sample, Callable[[], bytes]]]:
    """Reads a data set once, from its first row to its last, a few rows at a time.

    Args:
        path: As for `open_data`.

    Yields:
        Each sample with the function that returns its encoded image, to be called before the next
        sample is asked for.

    Raises:
        UserError: The path is not a data set, or a row or the header of its image is bad.
    """
    for row, sample, _, reasons in _checked(_rows(path, ParquetTable.streamed)):
        if sample is None or row.image is None:
            raise _bad_row(path, row, reasons)
        yield sample, functools.partial(_encoded, path, row)


def content_hash(path: Path) -> str:
    """Identifies a data set by its content, images included, wherever it is stored.

    Reads every byte once; the hashes of unchanged files are remembered. Rows are not checked.

    Args:
        path: As for `open_data`.

    Returns:
        A SHA-256, in hexadecimal.

    Raises:
        UserError: The path is not a data set.
    """
    files = _files(path)
    if files[0].suffix == ".jsonl":
        files += dict.fromkeys(row.path for row in json_rows(files[0]) if row.path)
    total = hashlib.sha256()
    for file in files:
        total.update(bytes.fromhex(hash_file(file)))
    return total.hexdigest()


def validate(path: Path) -> ValidationReport:
    """Checks a data set like `open_data`, but also decodes every image and lists every problem.

    Args:
        path: As for `open_data`.

    Returns:
        The counts and the problems.

    Raises:
        UserError: The path is not a data set, has no rows, or a Parquet file cannot be read.
    """
    rows = 0
    by_category: Counter[Category] = Counter()
    problems: list[RowProblem] = []
    for row, _, _, reasons in _checked(_rows(path, ParquetTable.streamed), decoding=True):
        rows += 1
        category, sample_id = row.values.get("category"), row.values.get("id")
        if isinstance(category, str) and category in list(Category):
            by_category[Category(category)] += 1
        problems += [
            RowProblem(row.number, sample_id if isinstance(sample_id, str) else None, reason)
            for reason in reasons
        ]
    if not rows:
        raise UserError(f"The data set {path} has no rows.", "Check the path, or add samples.")
    return ValidationReport(rows, dict(by_category), tuple(problems))


def write_data(path: Path, rows: Iterable[tuple[Sample, bytes]]) -> int:
    """Writes a data set as a Parquet file; see `srccore.data.parquet.parquet_writer`.

    Args:
        path: The file to write, ending in ``.parquet``; its folder must exist.
        rows: Samples, each with its encoded image (PNG, JPEG, ...). Read once, a group at a time.

    Returns:
        The number of rows written.

    Raises:
        UserError: An image is not one, or is too large.
    """
    with parquet_writer(path) as writer:
        for sample, encoded in rows:
            writer.add(sample, encoded)
    return writer.count


class _Copies:
    """The images of a data set whose own files are too slow to read one from.

    They are in one temporary file, which is made when the first arrives and has no name, so it is
    gone when the process ends.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _file(self) -> BinaryIO:
        return tempfile.TemporaryFile()

    def add(self, image: Callable[[], BinaryIO]) -> Callable[[], BinaryIO]:
        """Copies an image and returns what opens the copy."""
        encoded = image().read()
        try:
            start = self._file.tell()
            self._file.write(encoded)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"The images of {self._path} cannot be copied to {tempfile.gettempdir()}: "
                f"{error.strerror}.",
                "Free some space there, set TMPDIR to another folder, or pass the output of "
                "prepare-data, which needs no copy.",
            ) from None
        return functools.partial(self._open, start, len(encoded))

    def _open(self, start: int, length: int) -> BinaryIO:
        # Not with seek and read: threads and forked processes share the file's position.
        return io.BytesIO(os.pread(self._file.fileno(), length, start))


def _encoded(path: Path, row: Row) -> bytes:
    assert row.image is not None
    try:
        return _read(row.image)
    except ImageError as error:
        raise _bad_row(path, row, [str(error)]) from None


def _check_size(found: tuple[int, int], described: tuple[int, int]) -> None:
    if found != described:
        raise ImageError(
            "image has {} x {} pixels, but should have {} x {}".format(*found, *described)
        )


def _read(image: Callable[[], BinaryIO], sha256: str | None = None) -> bytes:
    try:
        with image() as file:
            encoded = file.read()
    except OSError as error:
        raise ImageError(f"image cannot be read ({error.strerror})") from None
    if sha256 is not None and hashlib.sha256(encoded).hexdigest() != sha256:
        raise ImageError("image differs from its image_sha256: the file was changed or is damaged")
    return encoded


def _checked(
    rows: Iterable[Row], *, trusting: bool = False, decoding: bool = False
) -> Iterator[tuple[Row, Sample | None, tuple[int, int] | None, list[str]]]:
    """Yields every row with its sample and its image's size, or the reasons why it has none.

    Args:
        rows: The rows.
        trusting: Whether the data set's own description of an image is enough.
        decoding: Whether images are decoded, not just opened.
    """
    first_rows: dict[str, int] = {}
    for row in rows:
        reasons = list(row.reasons)
        sample = size = None
        if row.readable:
            sample, more = _sample(row.values)
            reasons += more
        sample_id = row.values.get("id")
        if isinstance(sample_id, str) and sample_id:
            first = first_rows.setdefault(sample_id, row.number)
            if first != row.number:
                reasons.append(f"id {sample_id!r} is already used by row {first}")
        if trusting and row.recorded:
            size = row.recorded.size
        elif row.image is not None:
            try:
                size = _measure(row.image, row.recorded, decoding)
            except ImageError as error:
                reasons.append(str(error))
        yield row, None if reasons else sample, size, reasons


def _measure(
    image: Callable[[], BinaryIO], recorded: Recorded | None, decoding: bool
) -> tuple[int, int]:
    if recorded:
        _read(image, recorded.sha256)
    with image() as file, opened(file) as found:
        size = upright_size(found)
        if recorded:
            _check_size(size, recorded.size)
        if decoding:
            found.load()
    return size


def _sample(values: Mapping[str, Any]) -> tuple[Sample | None, list[str]]:
    reasons = {name: f"{name} is missing" for name in _REQUIRED if name not in values}
    for name in ("id", "question", "answer"):
        if isinstance(text := values.get(name), str) and not text.strip():
            reasons[name] = f"{name} is empty"
    category = values.get("category")
    if isinstance(category, str) and category not in list(Category):
        reasons["category"] = f"category {category!r} is unknown (known: {', '.join(Category)})"
    for name in sorted(values.keys() - set(_KNOWN)):
        reasons[name] = f"there is no column {name!r} (known: {', '.join(_KNOWN)})"
    sample = None
    try:
        sample = Sample.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            where = ".".join(str(part) for part in detail["loc"])
            # The reasons above are clearer than pydantic's for the same column.
            if detail["loc"][0] not in reasons:
                reasons[where] = f"{where}: {detail['msg']}"
    return sample, list(reasons.values())


def _as_needed(table: ParquetTable, first: int) -> Iterator[Row]:
    return table.indexed(first) if table.is_indexed else table.streamed(first)


def _rows(path: Path, read: Callable[[ParquetTable, int], Iterator[Row]]) -> Iterator[Row]:
    """Yields the rows of a data set.

    Args:
        path: As for `open_data`.
        read: How a Parquet file is read; it gets the number of its first row.
    """
    files = _files(path)
    if files[0].suffix == ".jsonl":
        yield from json_rows(files[0])
        return
    number = 0
    for file in files:
        for row in read(ParquetTable(file), number + 1):
            number = row.number
            yield row


def _files(path: Path) -> list[Path]:
    """Lists the JSON Lines file, or the Parquet files in order."""
    if path.is_dir():
        lines, tables = path / "samples.jsonl", sorted(path.glob("*.parquet"))
        found = [lines] * lines.is_file() + tables
        if tables and found != tables:
            raise UserError(
                f"{path} contains both samples.jsonl and .parquet files.", "Pass the one you mean."
            )
    else:
        found = [path] * (path.is_file() and path.suffix in (".jsonl", ".parquet"))
    if not found:
        raise UserError(
            f"{path} is not a data set.",
            "Pass a .parquet or .jsonl file, or a folder with .parquet files or samples.jsonl.",
        )
    return found


def _found(path: Path, by_id: Mapping[str, Sample], sample_id: str) -> Sample:
    try:
        return by_id[sample_id]
    except KeyError:
        raise UserError(
            f"The data set {path} has no sample {sample_id!r}.",
            "Pass the data set that the records were made from.",
        ) from None


def _bad_row(path: Path, row: Row, reasons: Sequence[str]) -> UserError:
    return UserError(f"Row {row.number} of {path}: {'; '.join(reasons)}.", _advice(path))


def _advice(path: Path) -> str:
    return f"Fix the row; `srccore data validate {path}` lists every bad row."
