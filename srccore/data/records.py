"""The records that stages pass on to each other, and their JSON Lines files.

A record file starts with a header line that names the record and its schema version; a reader
rejects any it does not know. Every record is a frozen pydantic model, so a bad value is reported
with its line. Images are never stored in record files: records refer to samples by id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from srccore.data.limits import MAX_RECORD_BYTES
from srccore.data.lines import bounded_lines
from srccore.errors import UserError
from srccore.files import atomically

__all__ = [
    "RATING_LEVELS",
    "REFERENCE",
    "Candidate",
    "CandidateSet",
    "Category",
    "Fact",
    "Judgement",
    "LabelledPair",
    "Preference",
    "Rating",
    "Rationale",
    "Record",
    "Response",
    "Sample",
    "Unrated",
    "Unusable",
    "read_records",
    "write_records",
]

RATING_LEVELS = (1, 2, 3, 4, 5)
"""The rating tokens: 5 = first much better, 3 = equal, 1 = second much better."""

REFERENCE = "reference"
"""Stands for a sample's reference response where the id of a candidate is expected."""

Text = Annotated[str, Field(min_length=1)]


class Category(StrEnum):
    """The three categories of the paper's training mixture (2:1:1)."""

    PERCEPTION = "perception"
    """Perception and world knowledge."""
    CHART = "chart"
    """Chart understanding."""
    MATH = "math"
    """Math and science."""


class Record(BaseModel):
    """Base of all records: frozen, no unknown fields, and a name and version for its files."""

    # JSON has no numbers that are not finite: they would be written as null.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    record: ClassVar[str] = ""
    version: ClassVar[int] = 1


class Fact(Record):
    """One thing that is true of a sample, as subject, relation and value.

    For example ``the red bar`` / ``is`` / ``3``: together the three make a sentence.
    """

    subject: Text
    relation: Text
    value: Text
    aliases: tuple[str, ...] = ()
    """Other ways to write the value."""
    visual: bool = True
    """Visible in the image; false for world knowledge and for derived steps."""
    needed: bool = True
    """The answer depends on it, so a correct rationale must state it."""

    @property
    def sentence(self) -> str:
        """The fact as a sentence, capitalised and with a full stop."""
        text = f"{self.subject} {self.relation} {self.value}."
        return text[0].upper() + text[1:]


class Sample(Record):
    """One question about one image; the image itself is read through the data set."""

    record: ClassVar[str] = "samples"
    id: Text
    category: Category
    question: Text
    answer: Text
    rationale: str | None = None
    facts: tuple[Fact, ...] = ()


class Rationale(Record):
    """A reference rationale of sample ``sample_id``, from the data set or from a teacher."""

    record: ClassVar[str] = "rationales"
    sample_id: Text
    rationale: Text


class Response(Record):
    """One model output of sample ``sample_id``, unparsed."""

    record: ClassVar[str] = "responses"
    sample_id: Text
    text: str
    token_count: int = Field(ge=0)
    finished: bool


class Judgement(Record):
    """A judge's verdict on a response's rationale, for samples without facts to check it."""

    record: ClassVar[str] = "judgements"
    sample_id: Text
    rationale_right: bool
    derived_answer: str
    """The answer that follows from the rationale alone; empty if none does."""


class Candidate(Record):
    """A response found by the search."""

    id: Text
    """Hash of sample and text: the same text has the same id in every shard."""
    text: str
    """Without surrounding white space."""
    drawn: str | None = None
    """What the policy wrote, with white space, so that it can be trained as it was drawn; null for
    a text of other origin."""
    log_probability: float = Field(le=1e-6)
    """Sum over the response's tokens and its end, natural log, at temperature 1."""
    token_count: int = Field(ge=1)
    """With the end."""


class CandidateSet(Record):
    """What the search found for one sample, best first."""

    record: ClassVar[str] = "candidates"
    sample_id: Text
    candidates: tuple[Candidate, ...]
    unfinished: int = Field(default=0, ge=0)
    """Beams still unfinished at the end, which were dropped."""
    unparsed: int = Field(default=0, ge=0)
    """Finished responses that are no candidates: without a rationale, or without an answer."""

    @model_validator(mode="after")
    def _distinct(self) -> CandidateSet:
        ids = [candidate.id for candidate in self.candidates]
        if len(set(ids)) != len(ids):
            raise ValueError(f"sample {self.sample_id} has two candidates with the same id")
        if REFERENCE in ids:
            raise ValueError(f"no candidate of sample {self.sample_id} may have the id {REFERENCE}")
        return self


class Rating(Record):
    """R-Scorer's verdict on an ordered pair of candidates of one sample.

    One of the two may be the sample's reference response: its id is `REFERENCE`.
    """

    record: ClassVar[str] = "ratings"
    sample_id: Text
    first: Text
    second: Text
    probabilities: tuple[float, float, float, float, float]
    """Over the rating tokens 1..5, renormalised."""
    mass: float = Field(ge=0, le=1 + 1e-6)
    """Share of the full softmax that falls on the five tokens: a health figure."""

    @model_validator(mode="after")
    def _is_distribution(self) -> Rating:
        if min(self.probabilities) < 0 or abs(sum(self.probabilities) - 1) > 1e-3:
            raise ValueError(f"{self.probabilities} is not a distribution over the rating tokens")
        return self


class Unrated(Record):
    """A sample whose candidates were not rated, since there is nothing to judge them against."""

    record: ClassVar[str] = "unrated"
    sample_id: Text


class LabelledPair(Record):
    """Two responses to one sample, with a teacher's rating of the first against the second."""

    record: ClassVar[str] = "labelled_pairs"
    sample_id: Text
    first: str
    second: str
    rating: int = Field(ge=1, le=5)


class Unusable(Record):
    """A teacher's answer about sample ``sample_id``, or a pair of its responses, without a result.

    It is in journals only: what was paid for is not asked again.
    """

    record: ClassVar[str] = "unusable"
    sample_id: Text
    first: str | None = None
    second: str | None = None
    problem: Text


class Preference(Record):
    """One pair (chosen, rejected) of candidates for one sample."""

    record: ClassVar[str] = "preferences"
    sample_id: Text
    chosen: Candidate
    rejected: Candidate
    margin: float
    """R-Scorer's folded verdict on the chosen against the rejected response, in [-1, 1]."""
    confidence: float = Field(ge=0, le=1)
    """Mean folded certainty of all pairs of candidates that contain either of the two."""
    anchor: float | None = None
    """The folded verdict on the chosen against the reference response, in [-1, 1]; null if the
    sample has none."""


R = TypeVar("R", bound=Record)


def write_records(path: Path, kind: type[R], records: Iterable[R]) -> int:
    """Writes a record file whole or not at all (a temporary file is renamed at the end).

    Args:
        path: The file to write; its folder must exist.
        kind: The record's class, which determines the header.
        records: The records, in the order to write them.

    Returns:
        The number of records written.
    """
    count = 0
    with atomically(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"record": kind.record, "version": kind.version}) + "\n")
        for record in records:
            file.write(record.model_dump_json() + "\n")
            count += 1
    return count


def read_records(path: Path, kind: type[R]) -> Iterator[R]:
    """Reads a record file, one record at a time.

    Args:
        path: A file that `write_records` made.
        kind: The record's class.

    Yields:
        The records, in the file's order.

    Raises:
        UserError: The file is missing, contains other records or another version, or has a bad
            line.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(
            f"The record file {path} cannot be read ({error.strerror}).",
            "Check the path, or run the stage that writes it.",
        ) from None
    with file:
        lines = bounded_lines(file, MAX_RECORD_BYTES)
        _check_header(path, next(lines, b""), kind)
        for number, line in enumerate(lines, start=2):
            try:
                # Of a line that is too long, nothing is left.
                yield kind.model_validate_json(line or b"")
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"]) or "the line"
                raise UserError(
                    f"Line {number} of {path} is not a valid {kind.record} record: "
                    f"{where}: {first['msg']}.",
                    "Fix the line, or run the stage that writes the file again.",
                ) from None


def _check_header(path: Path, line: bytes | None, kind: type[Record]) -> None:
    try:
        header = json.loads(line or b"")
        found = (header["record"], header["version"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path} is not a record file: its first line does not name a record and a version.",
            f'A file of {kind.record} starts with {{"record": "{kind.record}", '
            f'"version": {kind.version}}}.',
        ) from None
    if found != (kind.record, kind.version):
        raise UserError(
            f"{path} contains {str(found[0])[:60]} version {str(found[1])[:60]}, not "
            f"{kind.record} version {kind.version}.",
            f"Pass a file of {kind.record} written by this version of srccore.",
        )
