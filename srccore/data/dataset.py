"""Data sets: samples with their images, read, checked and written.

Two formats with the same columns (``id, category, image, question, answer``, and optionally
``rationale`` and ``facts``):

* Parquet in Hugging Face layout: a ``.parquet`` file, or a folder of them, read in the order of
  their names. ``image`` is ``struct<bytes, path>`` or plain binary; the path is never opened.
* JSON Lines: a folder with ``samples.jsonl``, or a ``.jsonl`` file. ``image`` is a path relative
  to the file's folder and must not leave it.

Rows are numbered from 1: the lines of a JSON Lines file, or the rows of all Parquet files
together. Images stay encoded on disk until they are used: a data set may be larger than memory.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic import ValidationError

from srccore.data.records import Category, Sample
from srccore.errors import UserError
from srccore.files import atomically
from srccore.hashing import hash_file

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "DataSet",
    "RowProblem",
    "ValidationReport",
    "open_data",
    "validate",
    "write_data",
]

_REQUIRED = ("id", "category", "question", "answer")
_KNOWN = ("image", *Sample.model_fields)
# Pillow's other readers are rarely used and less safe (EPS runs Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_GROUP_ROWS = 256
_CACHE_BYTES = 256 * 2**20
MAX_IMAGE_PIXELS = 40_000_000
"""Larger images are rejected: decoding one could exhaust the memory."""


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


class DataSet:
    """Samples and their images; made by `open_data`.

    Images are decoded on each access and not kept; their sizes are known from their headers. For
    Parquet files, up to about 256 MiB of recently used row groups of encoded images are cached.
    """

    def __init__(
        self,
        path: Path,
        samples: Sequence[Sample],
        places: Mapping[str, _Place],
        images: _Images,
        sizes: Mapping[str, tuple[int, int]],
    ) -> None:
        self.path = path
        self.samples = tuple(samples)
        self._by_id = {sample.id: sample for sample in self.samples}
        self._places = places
        self._images = images
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, sample_id: str) -> Sample:
        """Returns the sample with that id.

        Raises:
            UserError: The data set has no such sample.
        """
        try:
            return self._by_id[sample_id]
        except KeyError:
            raise UserError(
                f"The data set {self.path} has no sample {sample_id!r}.",
                "Pass the data set that the records were made from.",
            ) from None

    def image(self, sample_id: str) -> Image:
        """Returns the sample's image: RGB, rotated upright according to its EXIF data.

        Raises:
            UserError: There is no such sample, or its image cannot be decoded.
        """
        from PIL import ImageOps

        place = self._places[self.sample(sample_id).id]
        try:
            with self._images.opened(place) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except _ImageError as error:
            raise UserError(
                f"Sample {sample_id!r} of {self.path}: {error}.", _advice(self.path)
            ) from None

    def size(self, sample_id: str) -> tuple[int, int]:
        """Returns width and height of the sample's image, upright, without reading it.

        Raises:
            UserError: There is no such sample.
        """
        return self._sizes[self.sample(sample_id).id]

    def encoded(self, sample_id: str) -> bytes:
        """Returns the sample's image as it is stored, for `write_data`.

        Raises:
            UserError: There is no such sample.
        """
        with self._images.stream(self._places[self.sample(sample_id).id]) as file:
            return file.read()

    @cached_property
    def sha256(self) -> str:
        """Hash of all files of the data set, including image files; independent of their location.

        Reads every byte once, on first use.
        """
        images = (place for place in self._places.values() if isinstance(place, Path))
        total = hashlib.sha256()
        for path in dict.fromkeys([*_files(self.path), *images]):
            total.update(bytes.fromhex(hash_file(path)))
        return total.hexdigest()


def open_data(path: Path) -> DataSet:
    """Opens a data set and checks every row; of the images it checks only the headers.

    Args:
        path: A Parquet file, a folder of them, a JSON Lines file or a folder with one.

    Returns:
        The data set, with its samples in the order of the rows.

    Raises:
        UserError: The path is not a data set, or a row is bad; the first bad row is reported.
    """
    images = _Images()
    samples: list[Sample] = []
    places: dict[str, _Place] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for row, sample, size, reasons in _checked_rows(path, images, decode=False):
        if sample is None or row.place is None or size is None:
            raise UserError(f"Row {row.number} of {path}: {'; '.join(reasons)}.", _advice(path))
        samples.append(sample)
        places[sample.id] = row.place
        sizes[sample.id] = size
    return DataSet(path, samples, places, images, sizes)


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
    for row, _, _, reasons in _checked_rows(path, _Images(), decode=True):
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
    """Writes a Parquet file in Hugging Face layout, whole or not at all.

    ``datasets.load_dataset("parquet", data_files=...)`` reads its images as an Image feature.

    Args:
        path: The file to write, ending in ``.parquet``; its folder must exist.
        rows: Samples, each with its encoded image (PNG, JPEG, ...). Read once, 256 at a time.

    Returns:
        The number of rows written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema()
    count = 0
    remaining = iter(rows)
    # Dictionary encoding gains nothing for texts and images that hardly repeat.
    with (
        atomically(path) as temporary,
        pq.ParquetWriter(temporary, schema, use_dictionary=["category"]) as writer,
    ):
        while group := list(itertools.islice(remaining, _GROUP_ROWS)):
            values = [
                sample.model_dump(mode="json") | {"image": {"bytes": encoded, "path": None}}
                for sample, encoded in group
            ]
            writer.write_table(pa.Table.from_pylist(values, schema=schema))
            count += len(group)
    return count


@dataclass(frozen=True)
class _Cell:
    """Where the image of a Parquet row is."""

    file: Path
    group: int
    index: int


_Place = Path | _Cell


@dataclass(frozen=True)
class _Row:
    number: int
    values: Mapping[str, Any]
    """The columns without ``image``; null values are left out."""
    place: _Place | None
    """None if the row names no image that may be opened."""
    reasons: tuple[str, ...] = ()
    """What is already known to be wrong: the row is not readable, or the image's path is bad."""
    readable: bool = True


class _ImageError(Exception):
    """Why an image cannot be used, without a full stop."""


class _Images:
    """Opens images by their places, and rejects large ones before they are decoded."""

    def __init__(self) -> None:
        self._group = lru_cache(maxsize=1)(_read_images)

    def keep(self, largest_group: int) -> None:
        """Sets how many row groups are cached, given the size in bytes of the largest."""
        kept = max(1, _CACHE_BYTES // max(1, largest_group))
        self._group = lru_cache(maxsize=kept)(_read_images)

    def stream(self, place: _Place) -> BinaryIO:
        if isinstance(place, Path):
            return place.open("rb")
        value = self._group(place.file, place.group)[place.index].as_py()
        encoded = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(encoded, bytes):
            return io.BytesIO(encoded)
        if value is None:
            raise _ImageError("image is missing")
        raise _ImageError("image has no bytes, only a path, which is not opened; embed the images")

    @contextmanager
    def opened(self, place: _Place) -> Iterator[Image]:
        """Yields the image, not yet decoded; errors inside the block become `_ImageError` too."""
        import PIL.Image

        try:
            with self.stream(place) as file, warnings.catch_warnings():
                # The limit is checked below, where the message can name it.
                warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
                with PIL.Image.open(file, formats=_FORMATS) as image:
                    width, height = image.size
                    if width * height > MAX_IMAGE_PIXELS:
                        raise _ImageError(
                            f"image is too large: {width} x {height} pixels, "
                            f"more than {MAX_IMAGE_PIXELS}"
                        )
                    yield image
        except (_ImageError, UserError, MemoryError):
            raise
        except PIL.Image.DecompressionBombError:
            raise _ImageError(f"image is too large: more than {MAX_IMAGE_PIXELS} pixels") from None
        except PIL.UnidentifiedImageError:
            names = ", ".join(_FORMATS)
            raise _ImageError(f"image is corrupt or in none of the formats {names}") from None
        except Exception as error:  # Pillow's readers raise all kinds of errors on broken bytes.
            raise _ImageError(f"image is corrupt ({error})") from error


def _checked_rows(
    path: Path, images: _Images, *, decode: bool
) -> Iterator[tuple[_Row, Sample | None, tuple[int, int] | None, list[str]]]:
    """Yields every row with its sample and its image's size, or the reasons why it has none."""
    first_rows: dict[str, int] = {}
    for row in _rows(path, images):
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
        if row.place is not None:
            try:
                with images.opened(row.place) as image:
                    size = _upright_size(image)
                    if decode:
                        image.load()
            except _ImageError as error:
                reasons.append(str(error))
        yield row, None if reasons else sample, size, reasons


def _upright_size(image: Image) -> tuple[int, int]:
    """Reads width and height as `DataSet.image` has them, from the header alone."""
    from PIL.ExifTags import Base

    # A PNG that has no EXIF data yet would be decoded to look for some behind its pixels.
    seen = image.format != "PNG" or "exif" in image.info
    turned = seen and image.getexif().get(Base.Orientation) in (5, 6, 7, 8)
    width, height = image.size
    return (height, width) if turned else (width, height)


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


def _rows(path: Path, images: _Images) -> Iterator[_Row]:
    files = _files(path)
    if files[0].suffix == ".jsonl":
        return _json_rows(files[0])
    return _parquet_rows(files, images)


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


def _json_rows(path: Path) -> Iterator[_Row]:
    root = path.parent.resolve()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_row(number, line, root)


def _json_row(number: int, line: bytes, root: Path) -> _Row:
    try:
        values = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        return _Row(number, {}, None, (f"the line is not JSON ({error})",), readable=False)
    if not isinstance(values, dict):
        return _Row(number, {}, None, ("the line is not a JSON object",), readable=False)
    name = values.pop("image", None)
    values = {key: value for key, value in values.items() if value is not None}
    try:
        return _Row(number, values, _inside(root, name))
    except _ImageError as error:
        return _Row(number, values, None, (str(error),))


def _inside(root: Path, name: object) -> Path:
    """Resolves the path of an image file; nothing outside the root is ever opened."""
    if name is None:
        raise _ImageError("image is missing")
    if not isinstance(name, str) or not name:
        raise _ImageError("image is not a path")
    try:
        path = (root / name).resolve()
        if Path(name).is_absolute() or not path.is_relative_to(root):
            raise _ImageError(f"image path {name!r} is outside the data set's folder")
        if not path.is_file():
            raise _ImageError(f"image file {name!r} is missing")
    # A null byte, a loop of symbolic links, a name that is too long, a folder without permission.
    except (OSError, ValueError, RuntimeError) as error:
        raise _ImageError(f"image path {name!r} cannot be resolved ({error})") from None
    return path


def _parquet_rows(files: Sequence[Path], images: _Images) -> Iterator[_Row]:
    import pyarrow.parquet as pq

    metadata = {}
    for path in files:
        with _reading_parquet(path):
            metadata[path] = pq.read_metadata(path)
    groups = [(path, group) for path in files for group in range(metadata[path].num_row_groups)]
    images.keep(max((metadata[p].row_group(g).total_byte_size for p, g in groups), default=0))
    number = itertools.count(1)
    for path, group in groups:
        with _reading_parquet(path), pq.ParquetFile(path, memory_map=True) as file:
            names = file.schema_arrow.names
            texts = file.read_row_group(group, columns=[n for n in names if n != "image"])
        reasons = () if "image" in names else ("image is missing",)
        for index, values in enumerate(texts.to_pylist()):
            place = None if reasons else _Cell(path, group, index)
            yield _Row(next(number), _without_nulls(values), place, reasons)


def _without_nulls(value: Any) -> Any:
    """Drops nulls, with which Arrow fills the absent fields of a struct, so defaults apply."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _read_images(path: Path, group: int) -> Any:
    import pyarrow.parquet as pq

    with _reading_parquet(path), pq.ParquetFile(path, memory_map=True) as file:
        return file.read_row_group(group, columns=["image"]).column("image")


@contextmanager
def _reading_parquet(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"The Parquet file {path} cannot be read ({error}).", "Write or copy it again."
        ) from None


def _schema() -> Any:
    """Builds the Arrow schema of `write_data`, with the features that `datasets` looks for."""
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


def _advice(path: Path) -> str:
    return f"Fix the row; `srccore data validate {path}` lists every bad row."
