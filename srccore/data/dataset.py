"""Data sets: samples with their images, read, checked and written.

Two formats with the same columns (``id, category, image, question, answer``, and optionally
``rationale`` and ``facts``):

* Parquet in Hugging Face layout: a ``.parquet`` file, or a folder of them, read in the order of
  their names. ``image`` is ``struct<bytes, path>`` or plain binary; the path is never opened.
* JSON Lines: a folder with ``samples.jsonl``, or a ``.jsonl`` file. ``image`` is a path relative
  to the file's folder and must not leave it.

Rows are numbered from 1: the lines of a JSON Lines file, or the rows of all Parquet files
together. Texts and images stay on disk until they are used: a data set may be larger than memory.

What `write_data` wrote also has an index (`srccore.data.index`). Such a data set is opened without
reading its Parquet file, which need not be on this machine; an image is compared with its hash
whenever it is read, so a file that was changed afterwards is noticed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic import ValidationError

from srccore.data.images import ImageError, decode, opened, upright_size
from srccore.data.index import (
    Entry,
    ImagePlace,
    entry_at,
    entry_line,
    index_of,
    is_indexed,
    read_index,
)
from srccore.data.limits import MAX_CHARACTERS
from srccore.data.parquet import ParquetTable, parquet_writer
from srccore.data.records import Category, Sample
from srccore.data.rows import Row, json_rows
from srccore.data.texts import problems_of, problems_of_facts, shortened
from srccore.errors import UserError
from srccore.hashing import hash_file

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "CHANGED",
    "DataSet",
    "Read",
    "RowProblem",
    "ValidationReport",
    "content_hash",
    "open_data",
    "read_place",
    "read_samples",
    "stream_data",
    "validate",
    "write_data",
]

_REQUIRED = ("id", "category", "question", "answer")
_KNOWN = ("image", *Sample.model_fields)
_MOST_REASONS = 10
_MOST_NAMES = 3


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


Read = Callable[[Path, ImagePlace], bytes]
"""Reads an image of a Parquet file that has an index, and compares it with its hash.

Raises `ImageError`. A function of a module: it is pickled.
"""
CHANGED = "image differs from its SHA-256: the file was changed or is damaged"
"""What an `ImageError` says of an image that has another hash."""


class DataSet:
    """Samples and their images; made by `open_data`.

    Of each sample, its id and a number are in memory. Samples and images are read on each access
    and not kept. Several threads may read at once, and forked processes too. It is pickled as its
    path, and opened again by who receives it.
    """

    def __init__(
        self,
        path: Path,
        lines: BinaryIO,
        starts: Mapping[str, int],
        image: Callable[[ImagePlace], BinaryIO],
        read: Read,
    ) -> None:
        self.path = path
        self._lines = lines
        self._starts = starts
        self._image = image
        self._read = read

    def __reduce__(self) -> tuple[Callable[..., DataSet], tuple[Path, Read]]:
        return open_data, (self.path, self._read)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Sample]:
        """Yields the samples in the order of the rows."""
        return map(self.sample, self._starts)

    def sample(self, sample_id: str) -> Sample:
        """Returns the sample with that id.

        Raises:
            UserError: The data set has no such sample.
        """
        return self._entry(sample_id).sample

    def image(self, sample_id: str) -> Image:
        """Returns the sample's image: RGB, rotated upright according to its EXIF data.

        Raises:
            UserError: There is no such sample, its image cannot be decoded, or it is not the one
                that the data set describes.
        """
        place = self._entry(sample_id).image
        try:
            image = decode(_read(functools.partial(self._image, place)))
            _check_size(image.size, place.size)
        except ImageError as error:
            raise self._bad(sample_id, error) from None
        return image

    def image_key(self, sample_id: str) -> str:
        """Identifies the sample's image, to recognise one that several samples share.

        Returns:
            Its SHA-256 if that is known, else the sample's id.

        Raises:
            UserError: There is no such sample.
        """
        return self._entry(sample_id).image.sha256 or sample_id

    def size(self, sample_id: str) -> tuple[int, int]:
        """Returns width and height of the sample's image, upright, without reading it.

        Raises:
            UserError: There is no such sample.
        """
        return self._entry(sample_id).image.size

    def encoded(self, sample_id: str) -> bytes:
        """Returns the sample's image as it is stored, for `write_data`.

        Raises:
            UserError: There is no such sample, or its image is not the one that the data set
                describes.
        """
        place = self._entry(sample_id).image
        try:
            return _read(functools.partial(self._image, place))
        except ImageError as error:
            raise self._bad(sample_id, error) from None

    def _entry(self, sample_id: str) -> Entry:
        if sample_id not in self._starts:
            raise _unknown(self.path, sample_id)
        return entry_at(self._lines, self._starts[sample_id])

    def _bad(self, sample_id: str, error: ImageError) -> UserError:
        return UserError(f"Sample {sample_id!r} of {self.path}: {error}.", _advice(self.path))


def read_place(path: Path, place: ImagePlace) -> bytes:
    """Reads an image of a file on this machine.

    Raises:
        ImageError: The image has another hash.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(place.start)
        encoded = file.read(place.length)
    if place.sha256 is not None and hashlib.sha256(encoded).hexdigest() != place.sha256:
        raise ImageError(CHANGED)
    return encoded


def open_data(path: Path, read: Read = read_place) -> DataSet:
    """Opens a data set and checks every row.

    Of the images it checks the headers, unless an index describes them: then it reads none. The
    images of other Parquet files are copied to a temporary file, since their row groups may be too
    large to read one for one image.

    Args:
        path: A Parquet file, a folder of them, a JSON Lines file or a folder with one.
        read: Reads the images that an index describes.

    Returns:
        The data set, with its samples in the order of the rows.

    Raises:
        UserError: The path is not a data set, or a row is bad; the first bad row is reported.
    """
    if is_indexed(path):
        starts: dict[str, int] = {}
        for start, entry in read_index(path):
            if starts.setdefault(entry.sample.id, start) != start:
                raise UserError(
                    f"The index of {path} has the sample {entry.sample.id!r} twice.",
                    "Run prepare-data again.",
                )
        lines = Path(index_of(str(path))).open("rb")  # noqa: SIM115 - kept open
        return DataSet(path, lines, starts, functools.partial(_open_place, read, path), read)
    copy = _Copy(path, read)
    for row, sample, size, reasons in _checked(_rows(path, ParquetTable.streamed), trusting=True):
        if sample is None or row.image is None or size is None:
            raise _bad_row(path, row, reasons)
        try:
            copy.add(sample, row, row.image, size)
        except ImageError as error:
            raise _bad_row(path, row, [str(error)]) from None
    return DataSet(path, copy.lines, copy.starts, copy.image, read)


def read_samples(path: Path, ids: Iterable[str] | None = None) -> list[Sample]:
    """Reads samples of a data set without reading an image.

    Args:
        path: As for `open_data`.
        ids: Which samples, in which order; all in the order of the rows without it.

    Returns:
        The samples.

    Raises:
        UserError: The path is not a data set, has no sample of one of the ids, or a row is bad;
            the first bad row is reported.
    """
    names = None if ids is None else list(ids)
    wanted = None if names is None else set(names)
    found: dict[str, Sample] = {}
    for row, sample, _, reasons in _checked(_rows(path, ParquetTable.texts), trusting=True):
        if sample is None:
            raise _bad_row(path, row, reasons)
        if wanted is None or sample.id in wanted:
            found[sample.id] = sample
    if names is None:
        return list(found.values())
    for name in names:
        if name not in found:
            raise _unknown(path, name)
    return [found[name] for name in names]


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

    Reads every byte once, or an index, which has the hashes of the images; the hashes of unchanged
    files are remembered. Rows are not checked.

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
        identity = Path(index_of(str(file))) if is_indexed(file) else file
        total.update(bytes.fromhex(hash_file(identity)))
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
            RowProblem(
                row.number, shortened(sample_id) if isinstance(sample_id, str) else None, reason
            )
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


class _Copy:
    """The index of a data set that has none, and the images that are slow to read from its files.

    Both are temporary files without a name, so they are gone when the process ends.

    Args:
        path: The data set.
        read: Reads the images that an index describes.
    """

    def __init__(self, path: Path, read: Read) -> None:
        self._path = path
        self._read = read
        self.starts: dict[str, int] = {}
        with self._explained():
            self.lines: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - kept open
            self._images: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115

    def add(
        self, sample: Sample, row: Row, image: Callable[[], BinaryIO], size: tuple[int, int]
    ) -> None:
        """Adds a sample, and a copy of its image where that is not in a file of its own."""
        width, height = size
        if row.place:
            place = row.place
        elif row.path:
            length = row.path.stat().st_size
            place = ImagePlace(
                file=str(row.path), start=0, length=length, width=width, height=height
            )
        else:
            encoded = image().read()
            start = self._write(self._images, encoded)
            place = ImagePlace(start=start, length=len(encoded), width=width, height=height)
        entry = Entry(sample=sample, image=place)
        self.starts[sample.id] = self._write(self.lines, entry_line(entry))

    def _write(self, file: BinaryIO, data: bytes) -> int:
        with self._explained():
            start = file.tell()
            file.write(data)
            file.flush()
        return start

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"The data set {self._path} cannot be copied to a temporary file: "
                f"{error.strerror}.",
                "Free some space, set TMPDIR to another folder, or pass the output of "
                "prepare-data, which needs no copy.",
            ) from None

    def image(self, place: ImagePlace) -> BinaryIO:
        """Opens an image."""
        if place.file is not None:
            return _open_place(self._read, Path(place.file), place)
        # Not with seek and read: threads and forked processes share the file's position.
        return io.BytesIO(os.pread(self._images.fileno(), place.length, place.start))


def _open_place(read: Read, path: Path, place: ImagePlace) -> BinaryIO:
    return io.BytesIO(read(path, place))


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


def _read(image: Callable[[], BinaryIO]) -> bytes:
    try:
        with image() as file:
            return file.read()
    except OSError as error:
        raise ImageError(f"image cannot be read ({error.strerror})") from None


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
        if isinstance(sample_id, str) and 0 < len(sample_id) <= MAX_CHARACTERS["id"]:
            first = first_rows.setdefault(sample_id, row.number)
            if first != row.number:
                reasons.append(f"id {sample_id!r} is already used by row {first}")
        if trusting and row.place:
            size = row.place.size
        elif row.image is not None:
            try:
                size = _measure(row.image, row.place, decoding)
            except ImageError as error:
                reasons.append(str(error))
        yield row, None if reasons else sample, size, reasons


def _measure(
    image: Callable[[], BinaryIO], place: ImagePlace | None, decoding: bool
) -> tuple[int, int]:
    with (
        io.BytesIO(_read(image)) if place else image() as file,
        opened(file) as found,
    ):
        size = upright_size(found)
        if place:
            _check_size(size, place.size)
        if decoding:
            found.load()
    return size


def _sample(values: Mapping[str, Any]) -> tuple[Sample | None, list[str]]:
    reasons = {name: f"{name} is missing" for name in _REQUIRED if name not in values}
    reasons |= problems_of(values)
    category = values.get("category")
    if isinstance(category, str) and category not in list(Category):
        shown = repr(shortened(category))
        reasons["category"] = f"category {shown} is unknown (known: {', '.join(Category)})"
    known = {name: value for name, value in values.items() if name in _KNOWN}
    if unknown := sorted(values.keys() - known.keys()):
        reasons[""] = _no_column(unknown)
    sample = None
    try:
        sample = Sample.model_validate(known)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_input=False):
            where = ".".join(str(part) for part in detail["loc"])
            # The reasons above are clearer than pydantic's for the same column.
            if detail["loc"][0] not in reasons:
                reasons[where] = f"{shortened(where)}: {detail['msg']}"
    found = [*reasons.values(), *problems_of_facts(sample.facts if sample else ())]
    if len(found) > _MOST_REASONS:
        found[_MOST_REASONS:] = [f"and {len(found) - _MOST_REASONS:,} more"]
    return sample, found


def _no_column(names: Sequence[str]) -> str:
    known = f"(known: {', '.join(_KNOWN)})"
    if len(names) == 1:
        return f"there is no column {shortened(names[0])!r} {known}"
    shown = ", ".join(repr(shortened(name)) for name in names[:_MOST_NAMES])
    rest = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return f"there are no columns {shown}{rest} {known}"


def _rows(path: Path, read: Callable[[ParquetTable, int], Iterator[Row]]) -> Iterator[Row]:
    """Yields the rows of a data set.

    Args:
        path: As for `open_data`.
        read: How a Parquet file without an index is read; it gets the number of its first row.
    """
    files = _files(path)
    if files[0].suffix == ".jsonl":
        yield from json_rows(files[0])
        return
    number = 0
    for file in files:
        found = (
            _indexed(file, number + 1) if is_indexed(file) else read(ParquetTable(file), number + 1)
        )
        for row in found:
            number = row.number
            yield row


def _indexed(path: Path, first: int) -> Iterator[Row]:
    """Yields the rows of a file that has an index; an image is read when it is opened."""
    for number, (_, entry) in enumerate(read_index(path), start=first):
        place = entry.image.model_copy(update={"file": str(path)})
        image = functools.partial(_open_place, read_place, path, place)
        yield Row(number, entry.sample.model_dump(mode="json", exclude_none=True), image, place)


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
        is_file = path.is_file() and path.suffix in (".jsonl", ".parquet")
        found = [path] * (is_file or is_indexed(path))
    if not found:
        raise UserError(
            f"{path} is not a data set.",
            "Pass a .parquet or .jsonl file, or a folder with .parquet files or samples.jsonl.",
        )
    return found


def _unknown(path: Path, sample_id: str) -> UserError:
    return UserError(
        f"The data set {path} has no sample {sample_id!r}.",
        "Pass the data set that the records were made from.",
    )


def _bad_row(path: Path, row: Row, reasons: Sequence[str]) -> UserError:
    return UserError(f"Row {row.number} of {path}: {'; '.join(reasons)}.", _advice(path))


def _advice(path: Path) -> str:
    return f"Fix the row; `srccore data validate {path}` lists every bad row."
